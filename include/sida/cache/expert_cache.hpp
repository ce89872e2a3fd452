// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sida/backend/backend.hpp"
#include "sida/backend/buffer.hpp"
#include "sida/cache/array_store.hpp"
#include "sida/cache/budget.hpp"
#include "sida/cache/eviction_policy.hpp"
#include "sida/cache/expert_store.hpp"
#include "sida/cache/slab_parts.hpp"
#include "sida/cache/use_forecast.hpp"
#include "sida/core/error.hpp"

namespace sida {

/// Experts in fast memory under a hard limit: one arena of equal slots, allocated once.
///
/// Residency only: it loads nothing by itself. A slot is reserved (`reserve`), filled by whoever
/// reserved it, and committed; a resident expert is pinned by leases and evicted, by `Policy`, when
/// a slot is needed. Thread-safe; leases and reservations may end on any thread, before the cache.
template <Backend B, EvictionPolicy Policy>
class ExpertCache {
 public:
  /// A resident expert, pinned in its slot until the lease ends. Move-only.
  class Lease {
   public:
    Lease(Lease&& other) noexcept
        : cache_(std::exchange(other.cache_, nullptr)), slot_(other.slot_) {}
    Lease& operator=(Lease&& other) noexcept {
      std::swap(cache_, other.cache_);
      std::swap(slot_, other.slot_);
      return *this;
    }
    ~Lease() {
      if (cache_) cache_->release(slot_);
    }
    ExpertId id() const noexcept { return cache_->slots_[slot_].id; }
    /// The expert's slab; null where the store's own arrays are used in place.
    const std::byte* slab() const noexcept { return cache_->slab(slot_); }

   private:
    friend class ExpertCache;
    Lease(ExpertCache& cache, std::size_t slot) : cache_(&cache), slot_(slot) {}
    ExpertCache* cache_;
    std::size_t slot_;
  };

  /// A slot that an expert is being loaded into. Given up, it is free again. Move-only.
  class Loading {
   public:
    Loading(Loading&& other) noexcept
        : cache_(std::exchange(other.cache_, nullptr)), slot_(other.slot_) {}
    Loading& operator=(Loading&& other) noexcept {
      std::swap(cache_, other.cache_);
      std::swap(slot_, other.slot_);
      return *this;
    }
    ~Loading() {
      if (cache_) cache_->give_up(slot_);
    }
    ExpertId id() const noexcept { return cache_->slots_[slot_].id; }
    std::byte* slab() const noexcept { return cache_->arena_.data() + slot_ * cache_->slot_bytes_; }

   private:
    friend class ExpertCache;
    Loading(ExpertCache& cache, std::size_t slot) : cache_(&cache), slot_(slot) {}
    ExpertCache* cache_;
    std::size_t slot_;
  };

  /// Allocates the arena. With an ArrayStore and a budget for all experts on a backend whose fast
  /// memory is RAM nothing is allocated: the arrays are used in place.
  /// @throws InvalidArgument for a budget that buys no slot, OutOfMemory.
  ExpertCache(B& backend, std::shared_ptr<ExpertStore> store, const Budget& budget)
      : backend_(backend),
        store_(std::move(store)),
        slot_bytes_(store_->slab_bytes()),
        forecast_(store_->layers(), store_->experts()),
        slot_of_(static_cast<std::size_t>(total_experts()), none) {
    build(budget);
  }
  ExpertCache(const ExpertCache&) = delete;
  ExpertCache& operator=(const ExpertCache&) = delete;

  ExpertStore& store() const noexcept { return *store_; }
  std::int64_t total_experts() const noexcept {
    return std::int64_t{store_->layers()} * store_->experts();
  }
  std::size_t slot_bytes() const noexcept { return slot_bytes_; }
  std::int64_t slots() const {
    return locked([&] { return std::ssize(slots_); });
  }
  /// Bytes of fast memory that the arena takes; 0 in place.
  std::size_t capacity_bytes() const {
    return locked([&] { return arena_.size(); });
  }
  bool in_place() const {
    return locked([&] { return in_place_; });
  }

  /// Pins the expert if it is resident. @throws OutOfRange.
  std::optional<Lease> try_lease(ExpertId id) {
    const std::lock_guard lock(mutex_);
    return try_lease_locked(id);
  }

  /// A slot to load the expert into: a free one, or the policy's victim's. Nothing if the expert is
  /// resident or loading, or every slot is leased or loading. @throws OutOfRange.
  std::optional<Loading> reserve(ExpertId id) {
    const std::lock_guard lock(mutex_);
    return reserve_locked(id, [](ExpertId) { return true; });
  }

  /// The slot's bytes are there: the expert is resident, and pinned by the lease.
  Lease commit(Loading loading) {
    const std::lock_guard lock(mutex_);
    return commit_locked(std::move(loading), false);
  }

  std::vector<ExpertId> resident() const {
    return locked([&] {
      std::vector<ExpertId> ids;
      for (const Slot& slot : slots_)
        if (slot.state == State::resident) ids.push_back(slot.id);
      return ids;
    });
  }

  /// Replaces the arena by one of the new budget; every resident expert is dropped. Waits until no
  /// expert is leased or loading. @throws as the constructor; the cache is then empty but usable.
  void resize(const Budget& budget) {
    std::unique_lock lock(mutex_);
    budget.slots(total_experts(), slot_bytes_, store_->staging_bytes());  // refuse before anything
    changed_.wait(lock, [&] { return pinned_ == 0; });
    for (std::size_t slot = 0; slot < slots_.size(); ++slot) evict(slot);
    build(budget);
  }

  // What the scheduler does in one step with the cache's lock held.

  std::mutex& mutex() const noexcept { return mutex_; }
  /// Signalled when a lease or a load ends.
  std::condition_variable& changed() const noexcept { return changed_; }
  UseForecast& forecast() noexcept { return forecast_; }

  enum class Residency { absent, loading, resident };
  Residency residency_locked(ExpertId id) const {
    const std::size_t slot = slot_of_[checked(id)];
    if (slot == none) return Residency::absent;
    return slots_[slot].state == State::loading ? Residency::loading : Residency::resident;
  }
  std::optional<Lease> try_lease_locked(ExpertId id) {
    const std::size_t slot = slot_of_[checked(id)];
    if (slot == none || slots_[slot].state != State::resident) return std::nullopt;
    slots_[slot].read = true;
    policy_.used(id);
    return pin(slot);
  }
  /// As `reserve`, and only if `may_evict(victim)`.
  template <class MayEvict>
  std::optional<Loading> reserve_locked(ExpertId id, MayEvict&& may_evict) {
    if (slot_of_[checked(id)] != none) return std::nullopt;
    std::size_t slot = none;
    if (!free_.empty()) {
      slot = free_.back();
      free_.pop_back();
    } else {
      candidates_.clear();
      for (const Slot& other : slots_)
        if (other.state == State::resident && other.leases == 0) candidates_.push_back(other.id);
      if (candidates_.empty()) return std::nullopt;
      const ExpertId victim = candidates_[policy_.victim(candidates_, forecast_)];
      if (!may_evict(victim)) return std::nullopt;
      slot = slot_of_[checked(victim)];
      evict(slot);
      free_.pop_back();
    }
    slots_[slot] = {id, State::loading, 0, false, false};
    slot_of_[checked(id)] = slot;
    ++pinned_;
    return Loading(*this, slot);
  }
  Lease commit_locked(Loading loading, bool prefetched) {
    const std::size_t index = std::exchange(loading.cache_, nullptr) ? loading.slot_ : none;
    Slot& slot = slots_[index];
    slot.state = State::resident;
    slot.prefetched = prefetched;
    policy_.inserted(slot.id);
    --pinned_;
    return pin(index);
  }
  void mark_used_locked(const Lease& lease) {
    slots_[lease.slot_].read = true;
    policy_.used(slots_[lease.slot_].id);
  }
  /// Prefetches evicted, or still resident, that no layer has read.
  std::int64_t wasted_locked() const noexcept {
    std::int64_t unread = wasted_;
    for (const Slot& slot : slots_)
      unread += slot.state == State::resident && slot.prefetched && !slot.read;
    return unread;
  }
  std::int64_t evicted_unread_locked() const noexcept { return wasted_; }
  void reset_wasted_locked() noexcept { wasted_ = 0; }

 private:
  enum class State : std::uint8_t { empty, loading, resident };
  struct Slot {
    ExpertId id;
    State state = State::empty;
    std::int32_t leases = 0;
    bool prefetched = false;
    bool read = false;
  };
  static constexpr std::size_t none = static_cast<std::size_t>(-1);

  template <class F>
  auto locked(F&& f) const {
    const std::lock_guard lock(mutex_);
    return f();
  }
  std::size_t checked(ExpertId id) const {
    check_read(*store_, id, 0, 0);
    return static_cast<std::size_t>(id.layer) * static_cast<std::size_t>(store_->experts()) +
           static_cast<std::size_t>(id.expert);
  }
  const std::byte* slab(std::size_t slot) const noexcept {
    return in_place_ ? nullptr : arena_.data() + slot * slot_bytes_;
  }
  Lease pin(std::size_t slot) {
    ++slots_[slot].leases;
    ++pinned_;
    return Lease(*this, slot);
  }
  void release(std::size_t slot) {
    {
      const std::lock_guard lock(mutex_);
      --slots_[slot].leases;
      --pinned_;
    }
    changed_.notify_all();
  }
  void give_up(std::size_t slot) {
    {
      const std::lock_guard lock(mutex_);
      slot_of_[checked(slots_[slot].id)] = none;
      slots_[slot] = {};
      free_.push_back(slot);
      --pinned_;
    }
    changed_.notify_all();
  }
  void evict(std::size_t index) {
    Slot& slot = slots_[index];
    if (slot.state != State::resident) return;
    wasted_ += slot.prefetched && !slot.read;
    policy_.evicted(slot.id);
    slot_of_[checked(slot.id)] = none;
    slot = {};
    free_.push_back(index);
  }
  void build(const Budget& budget) {
    const auto count = static_cast<std::size_t>(
        budget.slots(total_experts(), slot_bytes_, store_->staging_bytes()));
    slots_.clear();
    free_.clear();
    arena_ = {};
    in_place_ = B::name() == "cpu" && std::ssize(slot_of_) == static_cast<std::int64_t>(count) &&
                dynamic_cast<const ArrayStore*>(store_.get()) != nullptr;
    if (!in_place_) {
      if (count * slot_bytes_ > backend_.available_bytes())
        throw OutOfMemory("memory: the budget's " + std::to_string(count) + " experts take " +
                          std::to_string(count * slot_bytes_) + " bytes, but " +
                          std::string(B::name()) + " has " +
                          std::to_string(backend_.available_bytes()) + " available");
      arena_ = Buffer<B>(backend_, count * slot_bytes_);
    }
    slots_.resize(count);
    for (std::size_t slot = count; slot-- > 0;) {
      if (in_place_) {
        const auto experts = static_cast<std::size_t>(store_->experts());
        slots_[slot] = {
            {static_cast<std::int32_t>(slot / experts), static_cast<std::int32_t>(slot % experts)},
            State::resident};
        slot_of_[slot] = slot;
        policy_.inserted(slots_[slot].id);
      } else {
        free_.push_back(slot);
      }
    }
  }

  B& backend_;
  std::shared_ptr<ExpertStore> store_;
  std::size_t slot_bytes_;
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  UseForecast forecast_;
  Policy policy_;
  Buffer<B> arena_;
  std::vector<Slot> slots_;
  std::vector<std::size_t> free_;
  std::vector<std::size_t> slot_of_;
  std::vector<ExpertId> candidates_;
  std::int64_t pinned_ = 0;  // leases and loads under way
  std::int64_t wasted_ = 0;
  bool in_place_ = false;
};

}  // namespace sida
