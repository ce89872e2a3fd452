// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <unordered_map>
#include <utility>

#include "sida/cache/eviction_policy.hpp"

namespace sida {

/// Least frequently used: evicts the expert with the fewest uses so far, resident or not; among
/// equals the one whose last use lies furthest back.
class LfuPolicy {
 public:
  static constexpr std::string_view name() noexcept { return "lfu"; }

  void inserted(ExpertId) noexcept {}
  void used(ExpertId id) {
    auto& [uses, last] = history_[id];
    ++uses;
    last = ++clock_;
  }
  void evicted(ExpertId) noexcept {}

  std::size_t victim(std::span<const ExpertId> candidates, const UseForecast&) const {
    std::size_t least = 0;
    for (std::size_t i = 1; i < candidates.size(); ++i)
      if (history(candidates[i]) < history(candidates[least])) least = i;
    return least;
  }

 private:
  using History = std::pair<std::uint64_t, std::uint64_t>;  // uses, time of the last

  History history(ExpertId id) const {
    const auto found = history_.find(id);
    return found == history_.end() ? History{} : found->second;
  }

  std::unordered_map<ExpertId, History> history_;
  std::uint64_t clock_ = 0;
};

static_assert(EvictionPolicy<LfuPolicy>);

}  // namespace sida
