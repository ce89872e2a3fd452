// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <utility>

#include "sida/backend/cuda_backend.hpp"
#include "sida/cache/expert_store.hpp"
#include "sida/cache/fill_slabs.hpp"
#include "sida/cache/host_memory.hpp"
#include "sida/cache/read_ring.hpp"
#include "sida/cache/slab_parts.hpp"
#include "sida/core/expert_id.hpp"

namespace sida {

/// The slow tier of the CUDA backend: experts in pinned host memory, in order of layer and expert
/// as far as `host_bytes` reach; those beyond are read from `source` each time, through a ring that
/// `host_bytes` pay for (see HostMemory).
class PinnedStore : public ExpertStore {
 public:
  /// Fills the pinned memory from `source` with `threads` threads, as many as read through the ring
  /// later; see fill_slabs for `report`. The backend must outlive it.
  /// @throws InvalidArgument as divide_host_memory, OutOfMemory, ThreadError, what the source or
  /// `report` throws.
  PinnedStore(CudaBackend& backend, std::shared_ptr<ExpertStore> source, std::size_t host_bytes,
              const FillReport& report = {}, int threads = 4)
      : source_(std::move(source)),
        memory_(divide_host_memory(host_bytes, source_->slab_bytes(), total())),
        slabs_(backend, memory_.experts * source_->slab_bytes(), threads),
        ring_memory_(backend, memory_.ring_bytes(), threads) {
    fill_slabs(*source_, {slabs_.data(), slabs_.size()}, threads, report);
    if (memory_.pieces > 0)
      ring_.emplace(*source_, std::span(ring_memory_.data(), ring_memory_.size()),
                    memory_.piece_bytes, threads);
  }

  std::int32_t layers() const noexcept override { return source_->layers(); }
  std::int32_t experts() const noexcept override { return source_->experts(); }
  std::size_t slab_bytes() const noexcept override { return source_->slab_bytes(); }

  void read(ExpertId id, std::size_t offset, std::span<std::byte> destination) override {
    check_read(*this, id, offset, destination.size());
    if (const std::byte* slab = pinned(id))
      std::memcpy(destination.data(), slab + offset, destination.size());
    else
      source_->read(id, offset, destination);
  }

  const std::byte* pinned(ExpertId id) const noexcept override {
    const std::size_t index = index_of(id, experts());
    return index < memory_.experts ? slabs_.data() + index * slab_bytes() : nullptr;
  }
  ReadRing* ring() noexcept override { return ring_ ? &*ring_ : nullptr; }
  /// Bytes of host memory that are pinned, for experts and for the ring.
  std::size_t pinned_bytes() const noexcept { return slabs_.size() + ring_memory_.size(); }

 private:
  std::size_t total() const noexcept {
    return static_cast<std::size_t>(source_->layers()) *
           static_cast<std::size_t>(source_->experts());
  }

  std::shared_ptr<ExpertStore> source_;
  HostMemory memory_;
  PinnedBuffer slabs_, ring_memory_;
  std::optional<ReadRing> ring_;
};

}  // namespace sida
