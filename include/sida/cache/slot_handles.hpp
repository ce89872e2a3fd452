// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <utility>

#include "sida/core/expert_id.hpp"

namespace sida {

/// A resident expert, pinned in its slot until the lease ends. Move-only; may end on any thread,
/// before the cache does.
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
    if (cache_) cache_->release(slot_);
  }

  ExpertId id() const noexcept { return cache_->slots_[slot_].id; }
  /// The expert's slab; null where the store's own arrays are used in place.
  const std::byte* slab() const noexcept { return cache_->slab(slot_); }

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
      : cache_(std::exchange(other.cache_, nullptr)), slot_(other.slot_) {}
  SlotLoading& operator=(SlotLoading&& other) noexcept {
    std::swap(cache_, other.cache_);
    std::swap(slot_, other.slot_);
    return *this;
  }
  ~SlotLoading() {
    if (cache_) cache_->give_up(slot_);
  }

  ExpertId id() const noexcept { return cache_->slots_[slot_].id; }
  /// Where the slab is to be written.
  std::byte* slab() const noexcept { return cache_->arena_.data() + slot_ * cache_->slot_bytes_; }

 private:
  friend Cache;
  SlotLoading(Cache& cache, std::size_t slot) noexcept : cache_(&cache), slot_(slot) {}

  Cache* cache_;
  std::size_t slot_;
};

}  // namespace sida
