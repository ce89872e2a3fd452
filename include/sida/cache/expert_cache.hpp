// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
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
#include "sida/cache/slot_handles.hpp"
#include "sida/cache/use_forecast.hpp"
#include "sida/core/error.hpp"
#include "sida/core/expert_id.hpp"

namespace sida {

/// Why an expert was brought: a layer asked for it, or it was foretold.
enum class LoadedFor : std::uint8_t { demand, table, look_ahead };

/// Experts in fast memory under a hard limit: one arena of equal slots, allocated once.
///
/// Residency only: it loads nothing by itself. A slot is reserved (`reserve`), filled by whoever
/// reserved it, and committed; a resident expert is pinned by leases and evicted, by `Policy`, when
/// a slot is needed. Thread-safe; backend and store must outlive it.
template <Backend B, EvictionPolicy Policy>
class ExpertCache {
 public:
  using Lease = SlotLease<ExpertCache>;
  using Loading = SlotLoading<ExpertCache>;
  using Fence = typename B::Fence;

  /// Allocates the arena. With an ArrayStore and a budget for all experts on a backend whose fast
  /// memory is RAM nothing is allocated: the arrays are used in place.
  /// @throws InvalidArgument for a budget that buys no slot, OutOfMemory.
  ExpertCache(B& backend, std::shared_ptr<ExpertStore> store, const Budget& budget)
      : backend_(backend),
        store_(std::move(store)),
        slot_bytes_(store_->slab_bytes()),
        budget_(budget),
        forecast_(store_->layers(), store_->experts()),
        slot_of_(static_cast<std::size_t>(total_experts()), none) {
    build();
  }
  ExpertCache(const ExpertCache&) = delete;
  ExpertCache& operator=(const ExpertCache&) = delete;
  /// Waits for what still reads or writes the slots.
  ~ExpertCache() {
    try {
      finish_slots();
    } catch (...) {  // of work that failed, which has ended
    }
  }

  ExpertStore& store() const noexcept { return *store_; }
  std::int64_t total_experts() const noexcept {
    return std::int64_t{store_->layers()} * store_->experts();
  }
  std::size_t slot_bytes() const noexcept { return slot_bytes_; }
  std::int64_t slots() const {
    return locked([&] { return slots_locked(); });
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
    return locked([&] { return try_lease_locked(id); });
  }

  /// A slot to load the expert into: a free one, or the policy's victim's. Nothing if the expert is
  /// resident or loading, or every slot is leased or loading. @throws OutOfRange.
  std::optional<Loading> reserve(ExpertId id) {
    return locked([&] { return reserve_locked(id, [](ExpertId) { return true; }); });
  }

  /// The slot's bytes are there behind `arrival`: the expert is resident, and pinned by the lease.
  Lease commit(Loading loading, const Fence& arrival = {}) {
    return locked([&] {
      const ExpertId id = loading.id();
      commit_locked(std::move(loading), LoadedFor::demand, arrival);
      return std::move(*try_lease_locked(id));
    });
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
  /// expert is leased or loading, and for what still reads or writes the slots.
  /// @throws as the constructor, or what such work threw; the old budget then stands, and where the
  /// new one is larger than the memory that there is, so do the experts.
  void resize(const Budget& budget) {
    std::unique_lock lock(mutex_);
    const std::size_t count = slots_for(budget);  // what cannot be is refused before anything
    if (!is_in_place(count)) expect_room(count);
    draining_ = true;
    changed_.wait(lock, [&] { return pinned_ == 0; });
    draining_ = false;
    finish_slots();
    for (std::size_t slot = 0; slot < slots_.size(); ++slot) evict(slot);
    const Budget old = std::exchange(budget_, budget);
    try {
      build();
    } catch (...) {
      budget_ = old;
      build();
      throw;
    }
  }

  // What the scheduler does in one step with the cache's lock held.

  enum class Residency { absent, loading, resident };

  std::mutex& mutex() const noexcept { return mutex_; }
  /// Signalled when a load ends, when a lease ends that somebody waits for, and by the scheduler.
  std::condition_variable& changed() const noexcept { return changed_; }
  UseForecast& forecast() noexcept { return forecast_; }
  /// True while a resize waits for the slots to be let go.
  bool draining_locked() const noexcept { return draining_; }
  /// Whether the end of a lease is to be signalled: somebody waits for a slot.
  void want_slot_locked(bool wanted) noexcept { slot_wanted_ = wanted; }
  std::int64_t slots_locked() const noexcept { return std::ssize(slots_); }
  /// Experts that are resident or loading.
  std::vector<ExpertId> held_locked() const {
    std::vector<ExpertId> ids;
    for (const Slot& slot : slots_)
      if (slot.state != State::empty) ids.push_back(slot.id);
    return ids;
  }
  /// Slots that are neither leased nor loading.
  std::int64_t unpinned_locked() const noexcept {
    std::int64_t count = 0;
    for (const Slot& slot : slots_) count += slot.state != State::loading && slot.leases == 0;
    return count;
  }
  /// Evictions so far of experts that were known to be used again.
  std::uint64_t regretted_locked() const noexcept { return regretted_; }

  Residency residency_locked(ExpertId id) const {
    const std::size_t slot = slot_of_[checked(id)];
    if (slot == none) return Residency::absent;
    return slots_[slot].state == State::loading ? Residency::loading : Residency::resident;
  }
  /// The slabs of a layer whose experts are all resident and stay until the arena is replaced,
  /// because there is a slot for every expert of all layers; by expert. Else empty.
  std::vector<const std::byte*> kept_locked(std::int32_t layer) const {
    std::vector<const std::byte*> slabs;
    if (slots_.size() < slot_of_.size() || in_place_) return slabs;
    for (std::int32_t expert = 0; expert < store_->experts(); ++expert) {
      const std::size_t slot = slot_of_[checked({layer, expert})];
      if (slot == none || slots_[slot].state != State::resident) return {};
      slabs.push_back(slab(slot));
    }
    return slabs;
  }
  /// Counts the arenas so far: what kept_locked() gave holds as long as this stays the same.
  std::uint64_t arenas_locked() const noexcept { return arenas_; }
  /// The resident expert is read, without a lease.
  void touch_locked(ExpertId id) {
    const std::size_t slot = slot_of_[checked(id)];
    if (slot == none || slots_[slot].state != State::resident) return;
    read(slots_[slot]);
    policy_.used(id);
  }
  std::optional<Lease> try_lease_locked(ExpertId id) {
    const std::size_t slot = slot_of_[checked(id)];
    if (slot == none || slots_[slot].state != State::resident) return std::nullopt;
    read(slots_[slot]);
    policy_.used(id);
    return pin(slot);
  }
  /// As `reserve`, from among the experts that may make way, `may_evict(victim)`, and only if the
  /// policy's choice is one that is accepted.
  template <class MayEvict, class Accepts>
  std::optional<Loading> reserve_locked(ExpertId id, MayEvict&& may_evict, Accepts&& accepts) {
    if (slot_of_[checked(id)] != none) return std::nullopt;
    std::optional<ExpertId> evicted;
    if (free_.empty()) {
      candidates_.clear();
      for (const Slot& other : slots_)
        if (other.state == State::resident && other.leases == 0 && may_evict(other.id))
          candidates_.push_back(other.id);
      if (candidates_.empty()) return std::nullopt;
      const std::size_t choice = policy_.victim(candidates_, forecast_);
      if (choice >= candidates_.size())
        throw StateError("the eviction policy '" + std::string(Policy::name()) + "' chose " +
                         std::to_string(choice) + " of " + std::to_string(candidates_.size()) +
                         " candidates");
      if (!accepts(candidates_[choice])) return std::nullopt;
      evicted = candidates_[choice];
      evict(slot_of_[checked(*evicted)]);
    }
    const std::size_t slot = free_.back();
    free_.pop_back();
    slots_[slot] = {id, State::loading};
    slot_of_[checked(id)] = slot;
    ++pinned_;
    return Loading(*this, slot, evicted);
  }
  template <class MayEvict>
  std::optional<Loading> reserve_locked(ExpertId id, MayEvict&& may_evict) {
    return reserve_locked(id, may_evict, [](ExpertId) { return true; });
  }
  void commit_locked(Loading loading, LoadedFor loaded_for, const Fence& arrival = {}) {
    loading.cache_ = nullptr;
    Slot& slot = slots_[loading.slot_];
    fences_[loading.slot_] = {arrival, arrival};
    slot.state = State::resident;
    slot.loaded_for = loaded_for;
    policy_.inserted(slot.id);
    --pinned_;
  }
  void give_up_locked(Loading loading) {
    loading.cache_ = nullptr;
    free_slot(loading.slot_);
  }
  /// What became of prefetched experts.
  struct Prefetched {
    std::int64_t wasted = 0;             ///< evicted unread
    std::int64_t look_ahead_wasted = 0;  ///< of these, the ones that look-ahead named
    std::int64_t look_ahead_used = 0;    ///< named by look-ahead, and read
  };
  const Prefetched& prefetched_locked() const noexcept { return prefetched_; }
  void reset_prefetched_locked() noexcept { prefetched_ = {}; }
  /// Prefetched experts that are resident and unread.
  std::int64_t unread_locked() const noexcept {
    return std::count_if(slots_.begin(), slots_.end(), is_unread);
  }
  /// Counts the prefetched experts that are resident and unread as wasted: nobody will read them.
  void waste_unread_locked() noexcept {
    for (Slot& slot : slots_) {
      waste_if_unread(slot);
      slot.read = true;
    }
  }

 private:
  friend Lease;
  friend Loading;
  enum class State : std::uint8_t { empty, loading, resident };
  struct Slot {
    ExpertId id;
    State state = State::empty;
    std::int32_t leases = 0;
    LoadedFor loaded_for = LoadedFor::demand;
    bool read = false;
  };
  // What streams do with a slot's bytes. Changed with the lock held, and not while somebody without
  // it may look: `arrival` stands as long as the expert is resident, `in_use` while it is loading.
  struct Fences {
    Fence arrival;
    Fence in_use;  // behind the arrival and all readers
  };
  static constexpr std::size_t none = static_cast<std::size_t>(-1);

  static bool is_unread(const Slot& slot) noexcept {
    return slot.state == State::resident && slot.loaded_for != LoadedFor::demand && !slot.read;
  }
  void read(Slot& slot) noexcept {
    prefetched_.look_ahead_used += is_unread(slot) && slot.loaded_for == LoadedFor::look_ahead;
    slot.read = true;
  }
  void waste_if_unread(const Slot& slot) noexcept {
    if (!is_unread(slot)) return;
    ++prefetched_.wasted;
    prefetched_.look_ahead_wasted += slot.loaded_for == LoadedFor::look_ahead;
  }
  template <class F>
  auto locked(F&& f) const {
    const std::lock_guard lock(mutex_);
    return f();
  }
  std::size_t checked(ExpertId id) const {
    check_read(*store_, id, 0, 0);
    return index_of(id, store_->experts());
  }
  const std::byte* slab(std::size_t slot) const noexcept {
    return in_place_ ? nullptr : arena_.data() + slot * slot_bytes_;
  }
  Lease pin(std::size_t slot) noexcept {
    ++slots_[slot].leases;
    ++pinned_;
    return Lease(*this, slot);
  }
  void release(std::size_t slot, const Fence& readers) {
    const std::lock_guard lock(mutex_);
    fences_[slot].in_use.add(readers);
    --slots_[slot].leases;
    --pinned_;
    if (slot_wanted_ || draining_) changed_.notify_all();
  }
  void give_up(std::size_t slot) {
    const std::lock_guard lock(mutex_);
    free_slot(slot);
  }
  void free_slot(std::size_t slot) {
    slot_of_[checked(slots_[slot].id)] = none;
    slots_[slot] = {};
    free_.push_back(slot);
    --pinned_;
    changed_.notify_all();
  }
  void evict(std::size_t index) {
    Slot& slot = slots_[index];
    if (slot.state != State::resident) return;
    waste_if_unread(slot);
    regretted_ += forecast_.next_use(slot.id).has_value();
    policy_.evicted(slot.id);
    slot_of_[checked(slot.id)] = none;
    slot = {};
    free_.push_back(index);
  }
  void finish_slots() {
    for (const Fences& fences : fences_) backend_.synchronize(fences.in_use);
  }
  void build() {
    const std::size_t count = slots_for(budget_);
    ++arenas_;
    slots_.clear();
    free_.clear();
    arena_ = {};
    in_place_ = is_in_place(count);
    if (!in_place_) {
      expect_room(count);
      arena_ = Buffer<B>(backend_, count * slot_bytes_);
    }
    slots_.resize(count);
    fences_.assign(count, {});
    for (std::size_t slot = count; slot-- > 0;) {
      if (in_place_) {
        const auto experts = static_cast<std::size_t>(store_->experts());
        slots_[slot] = {
            {static_cast<std::int32_t>(slot / experts), static_cast<std::int32_t>(slot % experts)},
            State::resident};
        slot_of_[slot] = slot;
        policy_.inserted(slots_[slot].id);
      } else {
        free_.push_back(slot);  // the lowest slot last, and so taken first
      }
    }
  }
  std::size_t slots_for(const Budget& budget) const {
    return static_cast<std::size_t>(
        budget.slots(total_experts(), slot_bytes_, store_->staging_bytes()));
  }
  bool is_in_place(std::size_t slots) const {
    return B::name() == "cpu" && slots == slot_of_.size() &&
           dynamic_cast<const ArrayStore*>(store_.get()) != nullptr;
  }
  // An arena is freed before the next is allocated.
  void expect_room(std::size_t slots) const {
    const std::size_t free = backend_.available_bytes(), bytes = slots * slot_bytes_;
    const std::size_t available = free + std::min(arena_.size(), ~free);
    if (bytes > available)
      throw OutOfMemory("memory: the budget's " + std::to_string(slots) + " experts take " +
                        std::to_string(bytes) + " bytes, but " + std::string(B::name()) + " has " +
                        std::to_string(available));
  }

  B& backend_;
  std::shared_ptr<ExpertStore> store_;
  std::size_t slot_bytes_;
  Budget budget_;
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  UseForecast forecast_;
  Policy policy_;
  Buffer<B> arena_;
  std::vector<Slot> slots_;
  std::vector<Fences> fences_;  // by slot
  std::vector<std::size_t> free_;
  std::vector<std::size_t> slot_of_;
  std::vector<ExpertId> candidates_;
  std::int64_t pinned_ = 0;  // leases and loads under way
  Prefetched prefetched_;
  std::uint64_t regretted_ = 0;
  std::uint64_t arenas_ = 0;
  bool in_place_ = false;
  bool slot_wanted_ = false;
  bool draining_ = false;
};

}  // namespace sida
