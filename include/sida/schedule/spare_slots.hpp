// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "sida/schedule/load_excess.hpp"

namespace sida {

/// Which share of the slots is spared from Belady's rule, for experts that come early.
///
/// By that rule an expert leaves only as the next one is due, which leaves the link idle until
/// then. Taken for fewer slots than there are, it lets experts leave that much earlier: the others
/// become a buffer between link and computation, and cost some loads. So there are none until a
/// layer has to wait while the link is idle, and fewer the more loads there were beyond Belady's.
///
/// Guarded by the cache's mutex.
class SpareSlots {
 public:
  static constexpr double at_most = 0.5;
  static constexpr double growth = 0.1;  ///< for each layer that waits in vain
  static constexpr double decay = 0.01;  ///< for each other layer

  /// A layer begins. `is_starved`: experts are missing, and the link is idle.
  void begin_layer(bool is_starved) noexcept {
    wanted_ = std::clamp(wanted_ + (is_starved ? growth : -decay), 0.0, at_most);
  }

  /// The share to spare, with this excess of loads, see LoadExcess.
  double share(double excess) const noexcept {
    const double left = (LoadExcess::allowed - excess) / LoadExcess::allowed;
    return wanted_ * std::clamp(2 * left, 0.0, 1.0);
  }

 private:
  double wanted_ = 0;
};

}  // namespace sida
