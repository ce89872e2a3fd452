// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <optional>
#include <utility>

#include "sida/core/expert_id.hpp"

namespace sida {

/// A resident expert, pinned in its slot until the lease ends. Move-only; may end on any thread,
/// before the cache does.
///
/// On a backend whose streams run behind the host, what reads the slab waits for arrival(), and the
/// lease ends with end_after(): the host waits for neither.
template <class Cache>
class SlotLease {
 public:
  SlotLease(SlotLease&& other) noexcept
      : cache_(std::exchange(other.cache_, nullptr)), slot_(other.slot_) {}
  SlotLease& operator=(SlotLease&& other) noexcept {
    std::swap(cache_, other.cache_);
    std::swap(slot_, other.slot_);
    return *this;
  }
  ~SlotLease() {
    if (cache_) cache_->release(slot_, {});
  }

  ExpertId id() const noexcept { return cache_->slots_[slot_].id; }
  /// The expert's slab; null where the store's own arrays are used in place.
  const std::byte* slab() const noexcept { return cache_->slab(slot_); }
  /// The slab's bytes are there once a stream, or the host, has waited for this.
  const typename Cache::Fence& arrival() const noexcept { return cache_->fences_[slot_].arrival; }

  /// Ends the lease at once, though what is enqueued before `readers` may still read the slab: the
  /// slot can be given to another expert, whose load waits for it.
  void end_after(const typename Cache::Fence& readers) {
    if (cache_) std::exchange(cache_, nullptr)->release(slot_, readers);
  }

 private:
  friend Cache;
  SlotLease(Cache& cache, std::size_t slot) noexcept : cache_(&cache), slot_(slot) {}

  Cache* cache_;
  std::size_t slot_;
};

/// A slot that an expert is being loaded into. Given up, it is free again. Move-only; may end on
/// any thread, before the cache does.
template <class Cache>
class SlotLoading {
 public:
  SlotLoading(SlotLoading&& other) noexcept
      : cache_(std::exchange(other.cache_, nullptr)),
        slot_(other.slot_),
        evicted_(other.evicted_) {}
  SlotLoading& operator=(SlotLoading&& other) noexcept {
    std::swap(cache_, other.cache_);
    std::swap(slot_, other.slot_);
    std::swap(evicted_, other.evicted_);
    return *this;
  }
  ~SlotLoading() {
    if (cache_) cache_->give_up(slot_);
  }

  ExpertId id() const noexcept { return cache_->slots_[slot_].id; }
  /// The expert that made way; nothing where a slot was free.
  std::optional<ExpertId> evicted() const noexcept { return evicted_; }
  /// What is to be waited for before the slab is written: it may still be read, or be on its way.
  const typename Cache::Fence& readers() const noexcept { return cache_->fences_[slot_].in_use; }
  /// Where the slab is to be written.
  std::byte* slab() const noexcept { return cache_->arena_.data() + slot_ * cache_->slot_bytes_; }

 private:
  friend Cache;
  SlotLoading(Cache& cache, std::size_t slot, std::optional<ExpertId> evicted) noexcept
      : cache_(&cache), slot_(slot), evicted_(evicted) {}

  Cache* cache_;
  std::size_t slot_;
  std::optional<ExpertId> evicted_;
};

}  // namespace sida
