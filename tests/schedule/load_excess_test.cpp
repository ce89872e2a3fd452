// SPDX-License-Identifier: Apache-2.0
//
// Beside the cache: the loads that Belady's rule needs, and how many more there were.

#include "sida/schedule/load_excess.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "sida/schedule/belady.hpp"
#include "support/catch.hpp"

using namespace sida;

namespace {

constexpr std::int32_t layers = 3, experts = 16;
using Steps = std::vector<std::vector<std::int32_t>>;  // experts that each step needs

Steps made_up(int passes, std::size_t active, std::uint32_t seed) {
  std::mt19937 random(seed);
  Steps steps(static_cast<std::size_t>(passes * layers));
  for (auto& needed : steps) {
    while (needed.size() < active) {
      const auto expert =
          static_cast<std::int32_t>(std::min(random() % experts, random() % experts));
      if (std::find(needed.begin(), needed.end(), expert) == needed.end()) needed.push_back(expert);
    }
    std::sort(needed.begin(), needed.end());
  }
  return steps;
}

std::int32_t layer_of(std::size_t step) { return static_cast<std::int32_t>(step % layers); }

// What is counted for the steps, all of them foretold.
double fewest_loads(const Steps& steps, std::int64_t slots, LoadExcess& excess) {
  UseForecast forecast(layers, experts);
  for (std::size_t step = 0; step < steps.size(); ++step)
    for (const std::int32_t expert : steps[step])
      forecast.add({layer_of(step), expert}, static_cast<std::int64_t>(step));
  for (std::size_t step = 0; step < steps.size(); ++step) {
    forecast.begin_layer(layer_of(step), static_cast<std::int64_t>(step), steps[step]);
    excess.needed(layer_of(step), steps[step], slots, forecast);
  }
  return excess.fewest();
}

std::vector<std::vector<LayerUses>> batches_of(const Steps& steps) {
  std::vector<std::vector<LayerUses>> batches(steps.size() / layers);
  for (std::size_t step = 0; step < steps.size(); ++step)
    batches[step / layers].push_back({steps[step], {}});
  return batches;
}

}  // namespace

TEST_CASE("Where all uses are foretold the fewest loads are Belady's", "[excess]") {
  const Steps steps = made_up(40, 5, 1);
  for (const std::int64_t slots : {8, 11, 15, 30, 48}) {
    CAPTURE(slots);
    LoadExcess excess(layers, experts);
    CHECK(fewest_loads(steps, slots, excess) ==
          static_cast<double>(belady_loads(batches_of(steps), slots)));
  }
}

TEST_CASE("The excess is what was loaded beyond Belady's, without what is still unread",
          "[excess]") {
  LoadExcess excess(layers, experts);
  CHECK(excess.excess(0) == 0);
  const double fewest = fewest_loads(made_up(40, 5, 1), 7, excess);
  CHECK(excess.excess(0) == -1);
  for (int i = 0; i < static_cast<int>(fewest) + 12; ++i) excess.loaded();
  CHECK(std::abs(excess.excess(0) - 12 / fewest) < 1e-12);
  CHECK(std::abs(excess.excess(4) - 8 / fewest) < 1e-12);
}

TEST_CASE("With other slots the count begins anew", "[excess]") {
  LoadExcess excess(layers, experts);
  fewest_loads(made_up(40, 5, 1), 7, excess);
  for (int i = 0; i < 1000; ++i) excess.loaded();
  REQUIRE(excess.excess(0) > 1);
  const Steps one = made_up(1, 5, 2);
  CHECK(fewest_loads(one, 8, excess) == static_cast<double>(belady_loads(batches_of(one), 8)));
  CHECK(excess.excess(0) == -1);
}

TEST_CASE("The past fades", "[excess]") {
  LoadExcess excess(layers, experts);
  const Steps steps = made_up(400, 5, 1);
  const auto all = static_cast<double>(belady_loads(batches_of(steps), 7));
  const double counted = fewest_loads(steps, 7, excess);
  CHECK(counted < 64 * 7);
  CHECK(counted < all / 2);
}
