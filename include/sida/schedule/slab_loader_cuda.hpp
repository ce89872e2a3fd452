// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <mutex>
#include <utility>
#include <vector>

#include "sida/backend/cuda_backend.hpp"
#include "sida/cache/expert_store.hpp"
#include "sida/schedule/slab_loader.hpp"

namespace sida {

/// On the GPU a range is copied from pinned memory: on one stream what is prefetched, on another,
/// of high priority, what a layer waits for. What is not pinned passes through a pinned buffer of
/// at most `staging_bytes`.
///
/// Transfer threads share the streams, so that their copies end one after the other and each has
/// the next one's time to ask for more: with two threads the link is never idle. A prefetch waits
/// for the awaited copies that were asked for before it; an awaited copy, at most for the chunks of
/// prefetches that are under way.
template <>
class SlabLoader<CudaBackend> {
 public:
  static constexpr std::size_t staging_bytes = 4u << 20;  ///< pinned, for each transfer thread
  static constexpr bool splits_awaited = false;           ///< nothing is to go in between

  /// @throws CudaError.
  explicit SlabLoader(CudaBackend& backend)
      : backend_(backend),
        prefetches_(backend.make_stream()),
        awaited_(backend.make_urgent_stream()) {}

  /// @throws what the store throws, CudaError, OutOfMemory.
  void load(ExpertStore& store, ExpertId id, std::size_t offset, std::size_t bytes, std::byte* slab,
            const CudaBackend::Fence& readers, bool is_awaited) {
    if (const std::byte* source = store.pinned(id))
      return copy(slab + offset, source + offset, bytes, readers, is_awaited);
    PinnedBuffer staging = take(std::min(bytes, staging_bytes));
    for (std::size_t done = 0; done < bytes;) {
      const std::size_t part = std::min(bytes - done, staging.size());
      store.read(id, offset + done, {staging.data(), part});
      copy(slab + offset + done, staging.data(), part, readers, is_awaited);
      done += part;
    }
    give_back(std::move(staging));
  }

 private:
  void copy(std::byte* to, const std::byte* from, std::size_t bytes,
            const CudaBackend::Fence& readers, bool is_awaited) {
    backend_.synchronize(enqueue(to, from, bytes, readers, is_awaited));
  }
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
    } catch (...) {  // the slot and the staging memory are used again, by the next load
      backend_.finish(stream);
      throw;
    }
  }

  PinnedBuffer take(std::size_t bytes) {
    {
      const std::lock_guard lock(mutex_);
      if (!staging_.empty()) {
        PinnedBuffer buffer = std::move(staging_.back());
        staging_.pop_back();
        if (buffer.size() >= bytes) return buffer;
      }
    }
    return PinnedBuffer(backend_, bytes);
  }
  void give_back(PinnedBuffer buffer) {
    const std::lock_guard lock(mutex_);
    staging_.push_back(std::move(buffer));
  }

  CudaBackend& backend_;
  std::mutex mutex_;
  CudaBackend::Stream prefetches_, awaited_;
  CudaBackend::Fence last_awaited_;
  std::vector<PinnedBuffer> staging_;  // at rest
};

}  // namespace sida
