// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <list>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "sida/cache/cache_stats.hpp"
#include "sida/cache/expert_cache.hpp"
#include "sida/schedule/load_excess.hpp"
#include "sida/schedule/prefetch_queue.hpp"
#include "sida/schedule/router_look_ahead.hpp"
#include "sida/schedule/spare_slots.hpp"

namespace sida {

/// How experts are transferred.
struct TransferOptions {
  int threads = 2;                     ///< loads under way at once
  std::size_t chunk_bytes = 4u << 20;  ///< a demand waits for at most one chunk a thread
  /// For how many uses ahead of the computation experts make way for a use that is not sure, even
  /// if they would have stayed otherwise. Fewer with few slots.
  std::int64_t uses_ahead = 4;
  double threshold = 0.4;  ///< experts wanted less surely are not brought early
};

/// Which expert is brought next, into whose slot, and for whom: what a layer waits for comes before
/// what is planned. It decides and keeps count; Transfers moves the bytes, Replay imagines them.
///
/// All state is guarded by the cache's mutex, which every member expects to be held.
template <class Cache>
class TransferQueue {
 public:
  /// What one layer call waits for; shared with who loads it.
  struct Awaited {
    std::vector<ExpertId> missing;               ///< not yet arrived
    std::vector<typename Cache::Lease> arrived;  ///< pinned as they became resident
    std::int64_t backlog = 0;                    ///< begun to load, and not yet computed
    std::exception_ptr error;                    ///< of a load
    bool abandoned = false;                      ///< nobody waits any more
  };

  /// A load under way.
  struct Load {
    typename Cache::Loading slot;
    ExpertId id;
    std::shared_ptr<Awaited> awaited;  ///< null: nobody waits for it
    LoadedFor loaded_for = LoadedFor::demand;
    bool joined = false;           ///< who waits came after it was begun
    bool is_by_who_waits = false;  ///< no transfer thread's
  };

  /// Whether who waits for an expert begins its load, see SlabLoader; null: never.
  using OnlyBegins = std::function<bool(ExpertId)>;

  TransferQueue(Cache& cache, const TransferOptions& options, OnlyBegins only_begins = {})
      : cache_(cache),
        options_(options),
        only_begins_(std::move(only_begins)),
        prefetches_(cache, options.threshold),
        look_ahead_(cache, options.threshold),
        excess_(cache.store().layers(), cache.store().experts()) {
    stats_.layers.resize(static_cast<std::size_t>(cache.store().layers()));
  }

  /// A layer begins, the one that the forecast has begun, and needs these experts.
  void begin_layer(std::int32_t layer, const std::vector<std::int32_t>& experts) {
    if (!prefetches_.empty()) weigh_loads(layer, experts);
    prefetches_.drop_before(cache_.forecast().now() + 1);
  }

  /// Asks for an expert that a layer needs now and that is not resident.
  void demand(ExpertId id, const std::shared_ptr<Awaited>& awaited) {
    if (join_under_way(id, awaited))
      ++awaited->backlog;
    else
      demands_.push_back(request_for(id, awaited));
  }

  /// Forgets the demands of a call that is not waiting any more.
  void abandon(const std::shared_ptr<Awaited>& awaited) {
    awaited->abandoned = true;
    const auto is_of_it = [&](const Request& request) { return request.awaited == awaited; };
    if (std::erase_if(demands_, is_of_it) > 0) wake();  // prefetches waited for them
  }

  /// Begins the load that comes next on a transfer thread; null if there is none, or no slot for
  /// it.
  Load* begin_next() {
    if (Load* load = begin_demand()) return load;
    return demands_.empty() ? begin_prefetch() : nullptr;
  }

  /// Begins the load of the oldest demand that is for transfer threads, or for who waits; null if
  /// there is none, or no slot for it.
  Load* begin_demand(bool by_who_waits = false) {
    for (;;) {
      const auto oldest = std::ranges::find(demands_, by_who_waits, &Request::is_by_who_waits);
      if (oldest == demands_.end()) return nullptr;
      const Request request = *oldest;
      std::optional<typename Cache::Loading> slot;
      try {
        slot = reserve_for(request);
        if (slot) spend(*slot);
      } catch (...) {  // of the policy
        request.awaited->error = std::current_exception();
      }
      // Without a slot, unless somebody else brought the expert or is about to.
      if (!slot && !request.awaited->error && !join_under_way(request.id, request.awaited) &&
          !hand_over(request.id, *request.awaited))
        return nullptr;
      std::erase_if(demands_, [&](const Request& other) {
        return other.id == request.id && other.awaited == request.awaited;
      });
      ++request.awaited->backlog;
      if (slot) {
        Load* const load = begin(std::move(*slot), request.awaited, LoadedFor::demand);
        load->is_by_who_waits = by_who_waits;
        return load;
      }
      cache_.changed().notify_all();
    }
  }

  /// Whether nobody needs the load under way any more: the layer that it was a guess for has begun,
  /// and did not ask for the expert.
  bool is_obsolete(const Load& load) const {
    return load.loaded_for == LoadedFor::look_ahead && !load.awaited && !look_ahead_.names(load.id);
  }

  /// The load is over: whole, or given up after `bytes` bytes, with the error if there was one. If
  /// it only began, the bytes are there behind `arrival`.
  void end(Load& load, std::size_t bytes, const std::exception_ptr& error,
           const typename Cache::Fence& arrival = {}) {
    stats_.bytes_moved += static_cast<std::int64_t>(bytes);
    if (bytes < cache_.slot_bytes()) {
      stats_.look_ahead_cancelled += !error && is_obsolete(load);
      cache_.give_up_locked(std::move(load.slot));
      failed(load, error);
      prefetches_.begin_anew();  // a table may have foretold it as well
    } else {
      cache_.commit_locked(std::move(load.slot), load.loaded_for, arrival);
      if (is_waited_for(load)) hand_over(load.id, *load.awaited);
    }
    const bool is_by_who_waits = load.is_by_who_waits;
    under_way_.remove_if([&](const Load& other) { return &other == &load; });
    if (!is_by_who_waits) cache_.changed().notify_all();  // who waits knows
  }

  bool has_demands() const noexcept { return !demands_.empty(); }
  /// Wakes transfer threads, where something is missing that they bring: nobody is woken for
  /// nothing, who would compete with a layer call for the lock.
  void wake() {
    const bool has_demand = std::ranges::count(demands_, false, &Request::is_by_who_waits) > 0;
    if (has_demand || prefetches_.has_work() || look_ahead_.has_work())
      cache_.changed().notify_all();
  }
  /// True if nothing is on the way to a call that waits, and nothing can be: no load is under way
  /// and every slot is leased.
  bool is_stuck() const { return under_way_.empty() && cache_.unpinned_locked() == 0; }

  /// Layer calls under way: none or one.
  int& calls() noexcept { return calls_; }
  PrefetchQueue<Cache>& prefetches() noexcept { return prefetches_; }
  RouterLookAhead<Cache>& look_ahead() noexcept { return look_ahead_; }
  CacheStats& stats() noexcept { return stats_; }
  /// The statistics, with totals and with what the cache knows.
  CacheStats summary() const {
    CacheStats stats = stats_;
    for (const LayerStats& layer : stats.layers) stats.total += layer;
    const auto& prefetched = cache_.prefetched_locked();
    stats.wasted = prefetched.wasted;
    stats.look_ahead_used = prefetched.look_ahead_used;
    stats.look_ahead_wasted = prefetched.look_ahead_wasted;
    stats.bytes_wasted = stats.wasted * static_cast<std::int64_t>(cache_.slot_bytes());
    return stats;
  }

 private:
  struct Request {
    ExpertId id;
    std::shared_ptr<Awaited> awaited;
    bool is_by_who_waits = false;  // no transfer thread's
  };

  Request request_for(ExpertId id, const std::shared_ptr<Awaited>& awaited) const {
    return {id, awaited, only_begins_ && only_begins_(id)};
  }

  Load* begin_prefetch() {
    if (cache_.draining_locked()) return nullptr;
    try {
      if (auto slot = look_ahead_.reserve_next())  // for the very next layer
        return begin(std::move(*slot), nullptr, LoadedFor::look_ahead);
      if (auto slot = prefetches_.reserve_next(reach())) {
        spend(*slot);
        return begin(std::move(*slot), nullptr, LoadedFor::table);
      }
    } catch (...) {  // of the policy: the layer that needs the expert meets it again
      ++stats_.failed_prefetches;
      look_ahead_.forget();
      prefetches_.drop_from(cache_.forecast().now());
    }
    return nullptr;
  }

  Load* begin(typename Cache::Loading slot, const std::shared_ptr<Awaited>& awaited,
              LoadedFor loaded_for) {
    ++stats_.loads;
    if (!prefetches_.empty()) excess_.loaded();
    stats_.prefetches += loaded_for != LoadedFor::demand;
    stats_.look_ahead_loads += loaded_for == LoadedFor::look_ahead;
    const ExpertId id = slot.id();
    return &under_way_.emplace_back(Load{std::move(slot), id, awaited, loaded_for});
  }

  bool join_under_way(ExpertId id, const std::shared_ptr<Awaited>& awaited) {
    for (Load& load : under_way_) {
      if (load.id != id) continue;
      load.awaited = awaited;
      load.joined = true;
      return true;
    }
    return false;
  }

  // How many loads were too many, and what that leaves to spare for those that come early.
  void weigh_loads(std::int32_t layer, const std::vector<std::int32_t>& experts) {
    excess_.needed(layer, experts, cache_.slots_locked(), cache_.forecast());
    const double excess = excess_.excess(cache_.unread_locked());
    are_loads_too_many_ = excess > LoadExcess::allowed;
    const bool waits = std::any_of(experts.begin(), experts.end(), [&](std::int32_t expert) {
      return cache_.residency_locked({layer, expert}) == Cache::Residency::absent;
    });
    spare_.begin_layer(waits && under_way_.empty());
    prefetches_.spare(spare_.share(excess));
  }
  // `uses_ahead`, fewer with few slots.
  std::int64_t reach() const noexcept {
    return std::min(options_.uses_ahead,
                    std::max<std::int64_t>(options_.threads, cache_.slots_locked() / 6));
  }
  // Experts on their way to a layer, or in its hands, that keep it and the link at work. More take
  // slots from experts that are used sooner, which few slots cannot bear, nor many loads too many.
  std::int64_t enough_backlog() const noexcept {
    const auto enough = std::clamp<std::int64_t>(cache_.slots_locked() / 33, 1, 4);
    return are_loads_too_many_ ? 1 : enough;
  }
  // While computation has enough to go on with, a demand waits for a slot of its own layer rather
  // than taking it from an expert that is used sooner.
  std::optional<typename Cache::Loading> reserve_for(const Request& request) {
    const UseForecast& forecast = cache_.forecast();
    const bool is_urgent = request.awaited->backlog < enough_backlog();
    const double again = is_urgent ? 0 : forecast.expected_use_after(request.id, forecast.now());
    return cache_.reserve_locked(
        request.id, [](ExpertId) { return true; },
        [&](ExpertId victim) { return is_urgent || forecast.expected_use(victim) >= again; });
  }
  // A load that takes the slot of an expert which was to stay leaves another there that was to make
  // way: the outlook, taken anew, keeps it. Until then prefetches take both, which moves more
  // bytes, and keeps the link at work.
  void spend(const typename Cache::Loading& slot) {
    if (slot.evicted() && !prefetches_.empty() && !prefetches_.leaves(*slot.evicted()) &&
        are_loads_too_many_)
      prefetches_.look_again();
  }
  static bool is_waited_for(const Load& load) noexcept {
    return load.awaited && !load.awaited->abandoned;
  }
  void failed(const Load& load, const std::exception_ptr& error) {
    if (load.loaded_for != LoadedFor::demand && error) {
      ++stats_.failed_prefetches;
      prefetches_.give_up(load.id);
      look_ahead_.give_up(load.id);
    }
    if (!is_waited_for(load)) return;
    // What was begun for another purpose, or another call, is tried once more for this one.
    if (load.joined && error) {
      --load.awaited->backlog;  // not begun, again
      demands_.push_front(request_for(load.id, load.awaited));
    } else {
      load.awaited->error = error;
    }
  }
  // Pins the expert, if it is resident, for the call that waits for it.
  bool hand_over(ExpertId id, Awaited& awaited) {
    auto lease = cache_.try_lease_locked(id);
    if (!lease) return false;
    std::erase(awaited.missing, id);
    awaited.arrived.push_back(std::move(*lease));
    return true;
  }

  Cache& cache_;
  TransferOptions options_;
  OnlyBegins only_begins_;
  CacheStats stats_;
  std::deque<Request> demands_;
  PrefetchQueue<Cache> prefetches_;
  RouterLookAhead<Cache> look_ahead_;
  LoadExcess excess_;
  SpareSlots spare_;
  bool are_loads_too_many_ = false;  // as of the layer at hand
  std::list<Load> under_way_;
  int calls_ = 0;
};

}  // namespace sida
