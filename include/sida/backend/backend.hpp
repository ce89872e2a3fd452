// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concepts>
#include <cstddef>
#include <string_view>

namespace sida {

/// Where fast memory lies and how bytes move: allocation, copies in the order of a stream, events,
/// fences.
/// No arithmetic; ExpertFfn and HashPredictor are specialised for each backend.
///
/// `allocate` throws OutOfMemory and returns memory aligned to at least 128 bytes. `copy_async`
/// returns at once where it can; the bytes are there when an event recorded behind it on the same
/// stream is complete.
///
/// A `Fence` stands behind work of one stream or several: what `fence` saw enqueued on a stream,
/// and what was put together with `add`. It can be copied and outlive the stream; a new one has
/// nothing before it. A stream that waits for a fence goes on when that work is done; the host does
/// not wait.
// clang-format off
template <class B>
concept Backend = requires(B& backend, const B& constant, void* to, const void* from,
                           std::size_t bytes, typename B::Stream& stream,
                           typename B::Event& event, typename B::Fence& fence,
                           const typename B::Fence& other) {
  requires std::copyable<typename B::Fence> && std::default_initializable<typename B::Fence>;
  { B::name() } -> std::convertible_to<std::string_view>;
  { backend.allocate(bytes) } -> std::same_as<void*>;
  { backend.deallocate(to, bytes) } noexcept;
  { backend.make_stream() } -> std::same_as<typename B::Stream>;
  { backend.make_event() } -> std::same_as<typename B::Event>;
  backend.copy_async(to, from, bytes, stream);
  backend.record(event, stream);
  backend.wait(stream, event);
  backend.synchronize(event);
  { backend.fence(stream) } -> std::same_as<typename B::Fence>;
  backend.wait(stream, other);
  backend.synchronize(other);
  fence.add(other);
  { constant.available_bytes() } -> std::same_as<std::size_t>;
};
// clang-format on

}  // namespace sida
