// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <span>
#include <string_view>

#include "sida/cache/eviction_policy.hpp"

namespace sida {

/// Belady's rule on what the hash tables foretell: evicts the expert whose next use lies furthest
/// in the future. Uses beyond the tables are estimated from the walk through the layers, each
/// expert's frequency and the time since its last use, see UseRates, so that without any table it
/// still does better than rules that go by one of these.
class LookAheadPolicy {
 public:
  static constexpr std::string_view name() noexcept { return "lookahead"; }

  void inserted(ExpertId) noexcept {}
  void used(ExpertId) noexcept {}
  void evicted(ExpertId) noexcept {}

  std::size_t victim(std::span<const ExpertId> candidates, const UseForecast& forecast) const {
    std::size_t furthest = 0;
    double longest = forecast.expected_use(candidates[0]);
    for (std::size_t i = 1; i < candidates.size(); ++i) {
      const double use = forecast.expected_use(candidates[i]);
      if (use > longest) {
        longest = use;
        furthest = i;
      }
    }
    return furthest;
  }
};

static_assert(EvictionPolicy<LookAheadPolicy>);

}  // namespace sida
