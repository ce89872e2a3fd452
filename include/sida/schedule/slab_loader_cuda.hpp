// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "sida/backend/cuda_backend.hpp"
#include "sida/cache/expert_store.hpp"
#include "sida/schedule/slab_loader.hpp"

namespace sida {

/// On the GPU a range is copied from pinned memory, on a stream of the calling transfer thread's
/// own, and waited for by an event. What is not pinned passes through a pinned buffer of at most
/// `staging_bytes`. Two threads keep the link busy: one's copy runs while the other asks for its
/// next.
template <>
class SlabLoader<CudaBackend> {
 public:
  static constexpr std::size_t staging_bytes = 4u << 20;  ///< pinned, for each transfer thread

  explicit SlabLoader(CudaBackend& backend) noexcept : backend_(backend) {}

  /// @throws what the store throws, CudaError, OutOfMemory.
  void load(ExpertStore& store, ExpertId id, std::size_t offset, std::size_t bytes, std::byte* slab,
            const CudaBackend::Fence& readers) {
    std::unique_ptr<Lane> lane = take();
    backend_.wait(lane->stream, readers);
    if (const std::byte* source = store.pinned(id))
      copy(*lane, slab + offset, source + offset, bytes);
    else
      copy_through(*lane, store, id, offset, bytes, slab);
    give_back(std::move(lane));  // a lane that failed is not used again
  }

 private:
  struct Lane {
    CudaBackend::Stream stream;
    CudaBackend::Event done;
    PinnedBuffer staging;
  };

  std::unique_ptr<Lane> take() {
    {
      const std::lock_guard lock(mutex_);
      if (!idle_.empty()) {
        std::unique_ptr<Lane> lane = std::move(idle_.back());
        idle_.pop_back();
        return lane;
      }
    }
    return std::make_unique<Lane>(Lane{backend_.make_stream(), backend_.make_event(), {}});
  }
  void give_back(std::unique_ptr<Lane> lane) {
    const std::lock_guard lock(mutex_);
    idle_.push_back(std::move(lane));
  }

  void copy(Lane& lane, std::byte* to, const std::byte* from, std::size_t bytes) {
    backend_.copy_async(to, from, bytes, lane.stream);
    backend_.record(lane.done, lane.stream);
    backend_.synchronize(lane.done);
  }
  void copy_through(Lane& lane, ExpertStore& store, ExpertId id, std::size_t offset,
                    std::size_t bytes, std::byte* slab) {
    const std::size_t needed = std::min(bytes, staging_bytes);
    if (lane.staging.size() < needed) lane.staging = PinnedBuffer(backend_, needed);
    for (std::size_t done = 0; done < bytes;) {
      const std::size_t part = std::min(bytes - done, lane.staging.size());
      store.read(id, offset + done, {lane.staging.data(), part});
      copy(lane, slab + offset + done, lane.staging.data(), part);
      done += part;
    }
  }

  CudaBackend& backend_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Lane>> idle_;
};

}  // namespace sida
