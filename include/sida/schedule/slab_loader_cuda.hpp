// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <mutex>

#include "sida/backend/cuda_backend.hpp"
#include "sida/cache/expert_store.hpp"
#include "sida/cache/read_ring.hpp"
#include "sida/core/error.hpp"
#include "sida/schedule/slab_loader.hpp"

namespace sida {

/// On the GPU a range is copied from pinned memory: on one stream what is prefetched, on another,
/// of high priority, what a layer waits for. What is not pinned passes through the store's ring.
///
/// What is awaited and pinned is only enqueued: the stream that computes waits for it, the host
/// goes on. Else the host waits. Transfer threads share the streams, so that their copies end one
/// after the other and each has the next one's time to ask for more: with two threads the link is
/// never idle. A prefetch waits for the awaited copies that were asked for before it; an awaited
/// copy, at most for the chunks of prefetches that are under way.
template <>
class SlabLoader<CudaBackend> {
 public:
  static constexpr bool splits_awaited = false;  ///< nothing is to go in between
  static constexpr bool may_only_begin = true;

  /// @throws CudaError.
  explicit SlabLoader(CudaBackend& backend)
      : backend_(backend),
        prefetches_(backend.make_stream()),
        awaited_(backend.make_urgent_stream()) {}

  /// @throws what the store throws, CudaError, InvalidArgument for a store without pinned memory.
  CudaBackend::Fence load(ExpertStore& store, ExpertId id, std::size_t offset, std::size_t bytes,
                          std::byte* slab, const CudaBackend::Fence& readers, bool is_awaited) {
    if (const std::byte* source = store.pinned(id)) {
      const auto arrival = enqueue(slab + offset, source + offset, bytes, readers, is_awaited);
      if (is_awaited) return arrival;
      backend_.synchronize(arrival);
      return {};
    }
    SIDA_EXPECTS(store.ring(),
                 "SlabLoader: expected a store with pinned memory; give the cache a PinnedStore");
    ReadRing::Reading reading(*store.ring(), id, offset, bytes);
    std::byte* to = slab + offset;
    for (auto piece = reading.next(); !piece.empty(); piece = reading.next()) {
      backend_.synchronize(enqueue(to, piece.data(), piece.size(), readers, is_awaited));
      to += piece.size();
    }
    return {};
  }

  /// Pinned memory can be copied from by whoever has the address.
  static bool only_begins(const ExpertStore& store, ExpertId id) {
    return store.pinned(id) != nullptr;
  }

 private:
  CudaBackend::Fence enqueue(std::byte* to, const std::byte* from, std::size_t bytes,
                             const CudaBackend::Fence& readers, bool is_awaited) {
    const std::lock_guard lock(mutex_);
    CudaBackend::Stream& stream = is_awaited ? awaited_ : prefetches_;
    backend_.wait(stream, readers);
    if (!is_awaited) backend_.wait(stream, last_awaited_);
    backend_.copy_async(to, from, bytes, stream);
    const CudaBackend::Fence done = fence(stream);
    if (is_awaited) last_awaited_ = done;
    return done;
  }
  CudaBackend::Fence fence(CudaBackend::Stream& stream) {
    try {
      return backend_.fence(stream);
    } catch (...) {  // the slot and the ring are used again, by the next load
      backend_.finish(stream);
      throw;
    }
  }

  CudaBackend& backend_;
  std::mutex mutex_;
  CudaBackend::Stream prefetches_, awaited_;
  CudaBackend::Fence last_awaited_;
};

}  // namespace sida
