// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "sida/core/expert_id.hpp"
#include "sida/hash/hash_table.hpp"

namespace sida {

/// A use that a hash table foretells: by when the expert is wanted, and how surely.
struct PlannedUse {
  std::int64_t step = 0;  ///< step of the layer, see UseForecast
  ExpertId id;
  float probability = 0;  ///< that some token of the batch needs it
};

/// What is wanted in fast memory, in the order in which it is to be there. Plain data.
using OffloadPlan = std::vector<PlannedUse>;

/// The uses that a table of one batch foretells, by layer and falling probability. What a batch
/// needs is the union over its tokens: an expert is wanted with probability 1 − Π(1 − p), and left
/// out below `least`. `first_step` is the step of layer 0. Ids outside [0, experts) are left
/// out.
inline OffloadPlan plan_uses(const HashTable& table, std::int32_t experts, std::int64_t first_step,
                             double least) {
  OffloadPlan plan;
  std::vector<double> unneeded(static_cast<std::size_t>(experts));
  for (std::int32_t layer = 0; layer < table.layers; ++layer) {
    std::fill(unneeded.begin(), unneeded.end(), 1.0);
    for (std::size_t i = table.index(layer, 0, 0); i < table.index(layer + 1, 0, 0); ++i) {
      const std::int32_t id = table.ids[i];
      const double probability = table.probs[i];
      if (id >= 0 && id < experts && probability > 0)
        unneeded[static_cast<std::size_t>(id)] *= 1.0 - std::min(probability, 1.0);
    }
    const auto begin = plan.size();
    for (std::int32_t expert = 0; expert < experts; ++expert) {
      const double wanted = 1.0 - unneeded[static_cast<std::size_t>(expert)];
      if (wanted > 0 && wanted >= least)
        plan.push_back({first_step + layer, {layer, expert}, static_cast<float>(wanted)});
    }
    std::stable_sort(
        plan.begin() + static_cast<std::ptrdiff_t>(begin), plan.end(),
        [](const PlannedUse& a, const PlannedUse& b) { return a.probability > b.probability; });
  }
  return plan;
}

}  // namespace sida
