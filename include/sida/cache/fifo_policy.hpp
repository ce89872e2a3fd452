// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <unordered_map>

#include "sida/cache/eviction_policy.hpp"

namespace sida {

/// First in, first out: evicts the expert that became resident first (the paper's policy, §3.3).
class FifoPolicy {
 public:
  static constexpr std::string_view name() noexcept { return "fifo"; }

  void inserted(ExpertId id) { order_[id] = ++clock_; }
  void used(ExpertId) noexcept {}
  void evicted(ExpertId id) { order_.erase(id); }

  std::size_t victim(std::span<const ExpertId> candidates, const UseForecast&) const {
    std::size_t first = 0;
    for (std::size_t i = 1; i < candidates.size(); ++i)
      if (order_.at(candidates[i]) < order_.at(candidates[first])) first = i;
    return first;
  }

 private:
  std::unordered_map<ExpertId, std::uint64_t> order_;
  std::uint64_t clock_ = 0;
};

static_assert(EvictionPolicy<FifoPolicy>);

}  // namespace sida
