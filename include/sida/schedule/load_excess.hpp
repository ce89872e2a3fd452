// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <set>
#include <utility>
#include <vector>

#include "sida/cache/use_forecast.hpp"
#include "sida/core/expert_id.hpp"

namespace sida {

/// How many more loads there are than Belady's rule needs: beside the cache runs another, in name
/// only, of as many slots, that loads nothing early and evicts what is used furthest in the future.
///
/// Loads that come early keep the link at work, and cost some that would not have been needed
/// otherwise; how many of those are worth it is decided here. Guarded by the cache's mutex, like
/// the forecast that it looks at.
class LoadExcess {
 public:
  /// Of Belady's loads: what may be spent on experts that come early.
  static constexpr double allowed = 0.08;

  LoadExcess(std::int32_t layers, std::int32_t experts)
      : experts_(experts),
        next_use_(static_cast<std::size_t>(layers) * static_cast<std::size_t>(experts), absent) {}

  /// A layer needs these experts now; what a layer needs it may have in any order.
  void needed(std::int32_t layer, const std::vector<std::int32_t>& experts, std::int64_t slots,
              const UseForecast& forecast) {
    if (std::exchange(slots_, slots) != slots) begin_anew();
    missing_.clear();
    for (const std::int32_t expert : experts) {
      const ExpertId id{layer, expert};
      if (forget(index(id)))
        hold(id, forecast);
      else
        missing_.push_back(id);
    }
    for (const ExpertId id : missing_) {
      if (std::ssize(by_use_) >= slots_) forget(std::prev(by_use_.end())->second);
      hold(id, forecast);
      ++fewest_;
    }
    // The past fades, so that the excess is that of the last loads.
    if (fewest_ < 64.0 * static_cast<double>(slots_)) return;
    fewest_ /= 2;
    loads_ /= 2;
  }

  /// An expert is loaded.
  void loaded() noexcept { ++loads_; }

  /// The loads that Belady's rule needs, halved with the past.
  double fewest() const noexcept { return fewest_; }

  /// The loads beyond Belady's, as a share of these; without `early` ones, which are still to be
  /// used.
  double excess(std::int64_t early) const noexcept {
    return fewest_ < 1 ? 0 : (loads_ - static_cast<double>(early)) / fewest_ - 1;
  }

 private:
  static constexpr double absent = -1;

  std::size_t index(ExpertId id) const noexcept { return index_of(id, experts_); }
  void begin_anew() {
    next_use_.assign(next_use_.size(), absent);
    by_use_.clear();
    fewest_ = loads_ = 0;
  }
  void hold(ExpertId id, const UseForecast& forecast) {
    double& next = next_use_[index(id)];
    next = forecast.expected_use_after(id, forecast.now());
    by_use_.insert({next, index(id)});
  }
  bool forget(std::size_t expert) {
    return by_use_.erase({std::exchange(next_use_[expert], absent), expert}) > 0;
  }

  std::int32_t experts_;
  std::vector<double> next_use_;                     // by expert
  std::set<std::pair<double, std::size_t>> by_use_;  // those that are held
  std::vector<ExpertId> missing_;
  std::int64_t slots_ = 0;
  double fewest_ = 0;
  double loads_ = 0;  // that there were
};

}  // namespace sida
