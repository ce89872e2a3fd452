// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <optional>
#include <queue>
#include <utility>
#include <vector>

#include "sida/cache/use_forecast.hpp"
#include "sida/core/expert_id.hpp"
#include "sida/schedule/offload_plan.hpp"

namespace sida {

/// Which experts leave anyway: Belady's rule, taken from what is resident now through the uses that
/// hash tables foretell. An expert that it evicts before its next use may make way for a prefetch
/// at once, since it has to be loaded anew in any case.
///
/// Guarded by the cache's mutex, like what it is made from.
class EvictionOutlook {
 public:
  static constexpr std::size_t uses_per_slot = 8;  ///< few experts stay unused for longer

  EvictionOutlook(std::int32_t layers, std::int32_t experts)
      : layers_(layers),
        experts_(experts),
        kept_(static_cast<std::size_t>(layers) * static_cast<std::size_t>(experts)) {}

  /// Looks anew. `uses` are in the order in which they take place; `held` is resident or loading;
  /// `slots` is 1 or more.
  /// Only the first `uses_per_slot` uses for each slot count: it takes O(experts + slots · log
  /// slots).
  void look(const std::deque<PlannedUse>& uses, const std::vector<ExpertId>& held,
            std::int64_t slots, const UseForecast& forecast) {
    const std::size_t count =
        std::min(uses.size(), static_cast<std::size_t>(slots) * uses_per_slot);
    find_next(uses, count, forecast);
    for (Kept& kept : kept_) {
      kept.held = false;
      kept.loads.clear();
    }
    furthest_ = {};
    free_ = slots;
    for (const ExpertId id : held) hold(index(id), next_[index(id)]);
    while (free_ < 0) evict_furthest();
    for (std::size_t i = 0; i < count; ++i) {
      const std::size_t expert = index(uses[i].id);
      if (!kept_[expert].held) {
        kept_[expert].loads.push_back(uses[i].step);
        if (free_ <= 0) evict_furthest();
      } else {
        ++free_;
      }
      hold(expert, after_[i]);
    }
  }

  /// Whether the expert, whose next use is foretold for `step`, or not at all, is evicted before.
  bool leaves(ExpertId id, std::optional<std::int64_t> step) const {
    const Kept& kept = kept_[index(id)];
    if (!step || *step > last_) return !kept.held;
    return std::binary_search(kept.loads.begin(), kept.loads.end(), *step);
  }

 private:
  struct Kept {
    bool held = false;
    double until = 0;                 // the next use, as an index
    std::vector<std::int64_t> loads;  // steps of the uses that find the expert absent, ascending
  };

  std::size_t index(ExpertId id) const noexcept { return index_of(id, experts_); }
  // When each expert is used first, and again after each use: as an index, beyond all of them what
  // is only to be expected.
  void find_next(const std::deque<PlannedUse>& uses, std::size_t count,
                 const UseForecast& forecast) {
    last_ = count == 0 ? forecast.now() : uses[count - 1].step;
    const auto beyond = static_cast<double>(count);
    next_.resize(kept_.size());
    for (std::int32_t layer = 0; layer < layers_; ++layer)
      for (std::int32_t expert = 0; expert < experts_; ++expert)
        next_[index({layer, expert})] =
            beyond + forecast.expected_use_after({layer, expert}, last_);
    after_.resize(count);
    for (std::size_t i = count; i-- > 0;) {
      double& next = next_[index(uses[i].id)];
      after_[i] = std::exchange(next, static_cast<double>(i));
    }
  }
  void hold(std::size_t expert, double until) {
    kept_[expert].held = true;
    kept_[expert].until = until;
    furthest_.push({until, expert});
    --free_;
  }
  void evict_furthest() {
    for (;;) {
      const auto [until, expert] = furthest_.top();
      furthest_.pop();
      if (!kept_[expert].held || kept_[expert].until != until) continue;  // used since
      kept_[expert].held = false;
      ++free_;
      return;
    }
  }

  std::int32_t layers_, experts_;
  std::vector<Kept> kept_;
  std::vector<double> next_, after_;
  std::priority_queue<std::pair<double, std::size_t>> furthest_;
  std::int64_t free_ = 0;
  std::int64_t last_ = 0;  // step that was looked at
};

}  // namespace sida
