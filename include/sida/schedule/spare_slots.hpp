// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>

#include "sida/schedule/load_excess.hpp"

namespace sida {

/// How many slots are spared from Belady's rule, for experts that come early.
///
/// By that rule an expert leaves only as the next one is due, which leaves the link idle until
/// then. Taken for fewer slots than there are, it lets experts leave that much earlier: the others
/// become a buffer between link and computation, and cost some loads. So there are none until a
/// layer has to wait while the link is idle, and fewer the more loads there were beyond Belady's.
///
/// Guarded by the cache's mutex.
class SpareSlots {
 public:
  static constexpr double at_most = 0.5;  ///< of all slots
  static constexpr double growth = 0.1;   ///< of all slots, for each layer that waits in vain
  static constexpr double decay = 0.01;   ///< of all slots, for each other layer

  /// A layer begins. `is_starved`: experts are missing, and the link is idle.
  void begin_layer(bool is_starved, std::int64_t slots) noexcept {
    const auto all = static_cast<double>(slots);
    wanted_ = std::clamp(wanted_ + all * (is_starved ? growth : -decay), 0.0, all * at_most);
  }

  /// The slots to spare, with this excess of loads, see LoadExcess.
  std::int64_t count(double excess) const noexcept {
    const double left = (LoadExcess::allowed - excess) / LoadExcess::allowed;
    return static_cast<std::int64_t>(wanted_ * std::clamp(2 * left, 0.0, 1.0));
  }

 private:
  double wanted_ = 0;
};

}  // namespace sida
