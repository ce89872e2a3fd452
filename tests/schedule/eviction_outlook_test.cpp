// SPDX-License-Identifier: Apache-2.0
#include "sida/schedule/eviction_outlook.hpp"

#include <cstdint>
#include <deque>
#include <random>
#include <vector>

#include "sida/schedule/belady.hpp"
#include "support/catch.hpp"

using sida::EvictionOutlook;
using sida::ExpertId;
using sida::LayerUses;
using sida::PlannedUse;
using sida::UseForecast;

namespace {

constexpr std::int32_t layers = 3, experts = 8;

/// Batches in which every layer needs some experts.
std::vector<std::vector<LayerUses>> random_batches(std::uint32_t seed, std::size_t count) {
  std::mt19937 random(seed);
  std::vector<std::vector<LayerUses>> batches(count, std::vector<LayerUses>(layers));
  for (auto& batch : batches)
    for (LayerUses& layer : batch)
      for (std::int32_t expert = 0; expert < experts; ++expert)
        if (random() % 3 == 0) layer.experts.push_back(expert);
  return batches;
}

std::deque<PlannedUse> planned(const std::vector<std::vector<LayerUses>>& batches) {
  std::deque<PlannedUse> uses;
  for (std::size_t batch = 0; batch < batches.size(); ++batch)
    for (std::int32_t layer = 0; layer < layers; ++layer)
      for (const std::int32_t expert : batches[batch][static_cast<std::size_t>(layer)].experts)
        uses.push_back({static_cast<std::int64_t>(batch) * layers + layer, {layer, expert}, 1});
  return uses;
}

UseForecast forecast_of(const std::deque<PlannedUse>& uses) {
  UseForecast forecast(layers, experts);
  for (const PlannedUse& use : uses) forecast.add(use.id, use.step);
  return forecast;
}

}  // namespace

TEST_CASE("the outlook of an empty cache loads hardly more often than Belady's rule") {
  const std::uint32_t seed = GENERATE(range(0u, 20u));
  const std::int64_t slots = GENERATE(1, 2, 5, 12, 24);
  const std::size_t most = static_cast<std::size_t>(slots) * EvictionOutlook::uses_per_slot;
  auto batches = random_batches(seed, 6);
  while (planned(batches).size() > most) batches.pop_back();
  const std::deque<PlannedUse> uses = planned(batches);

  EvictionOutlook outlook(layers, experts);
  outlook.look(uses, {}, slots, forecast_of(uses));

  std::int64_t loads = 0;
  for (const PlannedUse& use : uses) loads += outlook.leaves(use.id, use.step);
  // Which may have what a layer needs in the best order, where the outlook keeps to the plan's.
  const std::int64_t fewest = sida::belady_loads(batches, slots);
  CHECK(loads >= fewest);
  CHECK(loads <= fewest + fewest / 5);
}

TEST_CASE("who is used before anybody needs its slot stays, and who is used last leaves") {
  // Two slots, a and b in them; a is used at once, then c comes and goes, then b is used.
  const ExpertId a{0, 0}, b{2, 1}, c{1, 2};
  const std::deque<PlannedUse> uses{{0, a, 1}, {1, c, 1}, {2, b, 1}};
  EvictionOutlook outlook(layers, experts);
  outlook.look(uses, {a, b}, 2, forecast_of(uses));

  CHECK_FALSE(outlook.leaves(a, 0));
  CHECK(outlook.leaves(c, 1));             // has to be loaded
  CHECK_FALSE(outlook.leaves(b, 2));       // c takes the slot of a
  CHECK(outlook.leaves(a, std::nullopt));  // after its use
}

TEST_CASE("an outlook is that of the last look") {
  const ExpertId a{0, 0}, b{1, 0};
  const std::deque<PlannedUse> uses{{0, a, 1}, {1, b, 1}, {3, a, 1}};
  EvictionOutlook outlook(layers, experts);
  outlook.look(uses, {a}, 1, forecast_of(uses));
  CHECK(outlook.leaves(a, 3));
  outlook.look(uses, {a}, 2, forecast_of(uses));
  CHECK_FALSE(outlook.leaves(a, 3));
  outlook.look({}, {a, b}, 1, UseForecast(layers, experts));  // more than fits: one of them leaves
  CHECK(outlook.leaves(a, std::nullopt) != outlook.leaves(b, std::nullopt));
}
