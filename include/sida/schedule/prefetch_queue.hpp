// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <optional>
#include <utility>

#include "sida/cache/expert_cache.hpp"
#include "sida/schedule/eviction_outlook.hpp"
#include "sida/schedule/offload_plan.hpp"

namespace sida {

/// The uses that hash tables foretell, in the order of the walk through the layers, and which of
/// them is to be fetched next. Guarded by the cache's mutex.
///
/// A prefetch takes a free slot, or that of an expert which is used later than itself and leaves
/// before that use in any case, see EvictionOutlook; so it comes early, but moves few bytes twice.
/// Of sure uses that counts for a whole walk through the layers. Where uses are not sure the
/// outlook is not either: it counts for the next layer only, and the nearest `reach` of them may
/// take the slot of any expert that is used later.
template <class Cache>
class PrefetchQueue {
 public:
  /// Uses that are less probable than `threshold` bring nothing early.
  PrefetchQueue(Cache& cache, double threshold)
      : cache_(cache),
        threshold_(threshold),
        outlook_(cache.store().layers(), cache.store().experts()) {}

  double threshold() const noexcept { return threshold_; }
  /// Whether nothing is foretold.
  bool empty() const noexcept { return uses_.empty(); }
  /// Whether some foretold use may find its expert absent.
  bool has_work() const noexcept {
    return scanned_ < uses_.size() || (!empty() && regretted_ != cache_.regretted_locked());
  }

  void add(OffloadPlan plan) {
    std::erase_if(plan, [&](const PlannedUse& use) { return use.probability < threshold_; });
    if (plan.empty()) return;
    const auto later = [](std::int64_t step, const PlannedUse& use) { return step < use.step; };
    const auto place = std::upper_bound(uses_.begin(), uses_.end(), plan.front().step, later);
    if (place != uses_.end()) begin_anew();
    uses_.insert(place, plan.begin(), plan.end());
    is_outlook_old_ = true;
  }
  /// Whether a table asked for the expert at `step`, the step at hand.
  bool asked_for(ExpertId id, std::int64_t step) const {
    return cache_.forecast().next_use(id, threshold_) == step;
  }
  void drop_before(std::int64_t step) {
    while (!uses_.empty() && uses_.front().step < step) {
      uses_.pop_front();
      if (scanned_ > 0) --scanned_;
    }
  }
  void drop_from(std::int64_t step) {
    while (!uses_.empty() && uses_.back().step >= step) uses_.pop_back();
    is_outlook_old_ = true;
    begin_anew();
  }
  /// A load of the expert failed: none of the uses foretold so far brings it early.
  void give_up(ExpertId id) {
    std::erase_if(uses_, [&](const PlannedUse& use) { return use.id == id; });
    begin_anew();
  }

  /// A slot for the first use whose expert is absent, or nothing if none can be had for it.
  std::optional<typename Cache::Loading> reserve_next(std::int64_t reach) {
    UseForecast& forecast = cache_.forecast();
    drop_before(forecast.now());
    if (regretted_ != cache_.regretted_locked()) begin_anew();
    for (; scanned_ < uses_.size(); ++scanned_) {
      const PlannedUse& use = uses_[scanned_];
      if (cache_.residency_locked(use.id) == Cache::Residency::absent) {
        const bool is_sure = use.probability >= 1;
        const bool is_near = !is_sure && static_cast<std::int64_t>(scanned_) < reach;
        const std::int64_t until = forecast.now() + (is_sure ? cache_.store().layers() : 1);
        const bool is_soon = use.step <= until;
        return cache_.reserve_locked(use.id, [&](ExpertId victim) {
          return (is_near || (is_soon && leaves(victim))) && is_planned_later(victim, use.step) &&
                 forecast.expected_use(victim) > static_cast<double>(use.step);
        });
      }
    }
    return std::nullopt;
  }

  /// What is absent again has to be looked at again.
  void begin_anew() {
    scanned_ = 0;
    regretted_ = cache_.regretted_locked();
  }

  /// Whether the expert makes way before its next use in any case, see EvictionOutlook. The outlook
  /// is taken once for each plan: experts that made way since are gone from it, too.
  bool leaves(ExpertId id) {
    if (std::exchange(is_outlook_old_, false)) {
      const std::int64_t slots = cache_.slots_locked();
      const auto spared = static_cast<std::int64_t>(spare_ * static_cast<double>(slots));
      outlook_.look(uses_, cache_.held_locked(), slots - spared, cache_.forecast());
    }
    return outlook_.leaves(id, cache_.forecast().next_use(id, threshold_));
  }
  /// The outlook is to be taken anew.
  void look_again() noexcept { is_outlook_old_ = true; }
  /// The outlook is to be that of fewer slots by this share, less than 1, see SpareSlots; from the
  /// next on.
  void spare(double share) noexcept { spare_ = share; }

 private:
  // Or two experts whose uses are not sure, so that each is expected later than the other's step,
  // would make way for one another for ever.
  bool is_planned_later(ExpertId victim, std::int64_t step) const {
    const auto planned = cache_.forecast().next_use(victim, threshold_);
    return !planned || *planned > step;
  }

  Cache& cache_;
  double threshold_;
  std::deque<PlannedUse> uses_;
  std::size_t scanned_ = 0;  // uses at the front whose experts are there or under way
  EvictionOutlook outlook_;
  bool is_outlook_old_ = true;
  double spare_ = 0;  // a share: a resize may leave fewer slots than were spared before
  std::uint64_t regretted_ = 0;
};

}  // namespace sida
