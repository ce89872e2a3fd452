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

namespace detail {

/// The experts of the layer at a step of the walk through all batches.
inline std::vector<ExpertId> needed(const std::vector<std::vector<LayerUses>>& batches,
                                    std::int64_t step) {
  const std::int64_t layers = std::ssize(batches[0]);
  const auto layer = static_cast<std::int32_t>(step % layers);
  std::vector<ExpertId> ids;
  for (const std::int32_t expert :
       batches[static_cast<std::size_t>(step / layers)][static_cast<std::size_t>(layer)].experts)
    ids.push_back({layer, expert});
  return ids;
}

}  // namespace detail

/// The fewest loads with which `slots` slots can serve the uses: Belady's rule, which knows the
/// whole trace and evicts what is used furthest in the future. What a layer needs it may have in
/// any order, so experts that are there are used before others take their slots.
inline std::int64_t belady_loads(const std::vector<std::vector<LayerUses>>& batches,
                                 std::int64_t slots) {
  using Step = std::int64_t;
  constexpr Step never = std::numeric_limits<Step>::max();
  std::map<ExpertId, std::vector<Step>> steps;  // of each expert's uses, descending
  const auto layers = static_cast<Step>(batches.empty() ? 0 : batches[0].size());
  for (Step step = std::ssize(batches) * layers; step-- > 0;)
    for (const ExpertId id : detail::needed(batches, step)) steps[id].push_back(step);

  std::set<std::pair<Step, ExpertId>> by_use;  // the resident experts, by their next use
  const auto use = [&](ExpertId id) {
    std::vector<Step>& left = steps[id];
    left.pop_back();
    by_use.insert({left.empty() ? never : left.back(), id});
  };
  std::int64_t loads = 0;
  for (Step step = 0; step < std::ssize(batches) * layers; ++step) {
    std::vector<ExpertId> missing;
    for (const ExpertId id : detail::needed(batches, step)) {
      if (by_use.erase({step, id}) > 0)
        use(id);
      else
        missing.push_back(id);
    }
    for (const ExpertId id : missing) {
      ++loads;
      if (std::ssize(by_use) == slots) by_use.erase(std::prev(by_use.end()));
      use(id);
    }
  }
  return loads;
}

}  // namespace sida
