// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concepts>
#include <cstddef>
#include <string_view>

namespace sida {

/// Where fast memory lies and how bytes move: allocation, copies in the order of a stream, events.
/// No arithmetic; ExpertFfn and HashPredictor are specialised for each backend.
///
/// `allocate` throws OutOfMemory and returns memory aligned to at least 128 bytes. `copy_async`
/// returns at once where it can; the bytes are there when an event recorded behind it on the same
/// stream is complete.
// clang-format off
template <class B>
concept Backend = requires(B& backend, const B& constant, void* to, const void* from,
                           std::size_t bytes, typename B::Stream& stream,
                           typename B::Event& event) {
  { B::name() } -> std::convertible_to<std::string_view>;
  { backend.allocate(bytes) } -> std::same_as<void*>;
  { backend.deallocate(to, bytes) } noexcept;
  { backend.make_stream() } -> std::same_as<typename B::Stream>;
  { backend.make_event() } -> std::same_as<typename B::Event>;
  backend.copy_async(to, from, bytes, stream);
  backend.record(event, stream);
  backend.wait(stream, event);
  backend.synchronize(event);
  { constant.available_bytes() } -> std::same_as<std::size_t>;
};
// clang-format on

}  // namespace sida
