// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <set>
#include <span>
#include <utility>
#include <vector>

#include "sida/core/expert_id.hpp"
#include "sida/hash/hash_table.hpp"

namespace sida {

/// Experts that a layer call needs, ascending, and which of them more than padding needs.
struct LayerUses {
  std::vector<std::int32_t> experts;
  std::vector<std::uint8_t> counted;
};

/// What each layer of each batch needs, from recorded routing: [batch][layer]. Experts of
/// probability 0 are needed by padding alone.
inline std::vector<std::vector<LayerUses>> uses_of(const HashTable& routing) {
  std::vector<std::vector<LayerUses>> batches;
  for (std::int64_t batch = 0; batch < routing.batches(); ++batch) {
    auto& layers = batches.emplace_back();
    const auto b = static_cast<std::size_t>(batch);
    for (std::int32_t layer = 0; layer < routing.layers; ++layer) {
      std::map<std::int32_t, bool> needed;
      const std::size_t begin = routing.index(layer, routing.offsets[b], 0);
      const std::size_t end = routing.index(layer, routing.offsets[b + 1], 0);
      for (std::size_t i = begin; i < end; ++i)
        if (routing.ids[i] >= 0) needed[routing.ids[i]] |= routing.probs[i] > 0;
      LayerUses& uses = layers.emplace_back();
      for (const auto& [expert, counted] : needed) {
        uses.experts.push_back(expert);
        uses.counted.push_back(counted);
      }
    }
  }
  return batches;
}

/// The fewest loads with which `slots` slots can serve the uses, one after the other: Belady's
/// rule, which knows the whole trace and evicts what is used furthest in the future.
inline std::int64_t belady_loads(const std::vector<std::vector<LayerUses>>& batches,
                                 std::int64_t slots) {
  std::vector<ExpertId> uses;
  for (const auto& layers : batches)
    for (std::size_t layer = 0; layer < layers.size(); ++layer)
      for (const std::int32_t expert : layers[layer].experts)
        uses.push_back({static_cast<std::int32_t>(layer), expert});
  constexpr std::size_t never = std::numeric_limits<std::size_t>::max();
  std::vector<std::size_t> next(uses.size(), never);
  std::map<ExpertId, std::size_t> seen;
  for (std::size_t i = uses.size(); i-- > 0;) {
    if (const auto later = seen.find(uses[i]); later != seen.end()) next[i] = later->second;
    seen[uses[i]] = i;
  }
  std::map<ExpertId, std::size_t> next_use;           // of the resident experts
  std::set<std::pair<std::size_t, ExpertId>> by_use;  // the same, by time
  std::int64_t loads = 0;
  for (std::size_t i = 0; i < uses.size(); ++i) {
    if (const auto found = next_use.find(uses[i]); found != next_use.end()) {
      by_use.erase({found->second, uses[i]});
    } else {
      ++loads;
      if (std::ssize(by_use) == slots) {
        next_use.erase(by_use.rbegin()->second);
        by_use.erase(std::prev(by_use.end()));
      }
    }
    next_use[uses[i]] = next[i];
    by_use.insert({next[i], uses[i]});
  }
  return loads;
}

}  // namespace sida
