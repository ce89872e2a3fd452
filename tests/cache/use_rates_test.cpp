// SPDX-License-Identifier: Apache-2.0
//
// How often experts are used, and what time since their last use says of it.

#include "sida/cache/use_rates.hpp"

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "support/catch.hpp"

using namespace sida;

namespace {

constexpr std::size_t experts = 16;

// Passes of one layer; `needed` gives the experts of each.
template <class Needed>
UseRates after(int passes, Needed&& needed) {
  UseRates rates(experts);
  for (int pass = 0; pass < passes; ++pass) {
    rates.begin_pass();
    rates.begin_layer(0, experts, needed(pass));
  }
  return rates;
}

}  // namespace

TEST_CASE("Frequencies are the share of the passes, and never nothing", "[rates]") {
  const UseRates rates = after(99, [](int pass) {
    return pass % 3 == 0 ? std::vector<std::int32_t>{2, 5} : std::vector<std::int32_t>{5};
  });
  CHECK(std::abs(rates.frequency(5) - 0.995) < 1e-9);
  CHECK(std::abs(rates.frequency(2) - 0.335) < 1e-9);
  CHECK(rates.frequency(0) > 0);
  CHECK(rates.frequency(0) < 0.01);
}

TEST_CASE("Frequencies follow a change of topic", "[rates]") {
  const UseRates rates =
      after(2000, [](int pass) { return std::vector<std::int32_t>{pass < 1000 ? 1 : 2}; });
  CHECK(rates.frequency(2) > 2 * rates.frequency(1));
}

TEST_CASE("Where uses follow one another what was used last is more likely", "[rates]") {
  // One expert for eight passes, then another.
  const UseRates rates = after(1600 + 4, [](int pass) {
    return std::vector<std::int32_t>{(pass / 8 * 5) % static_cast<int>(experts)};
  });
  const std::size_t last = 1600 / 8 * 5 % experts, other = (last + 1) % experts;
  CHECK(rates.chance(last, 1) > 0.5);
  CHECK(rates.chance(other, 1) < 0.1);
  CHECK(rates.chance(last, 40) < rates.chance(last, 1) / 4);
}

TEST_CASE("Where uses do not depend on those before, time since the last says nothing", "[rates]") {
  std::mt19937 random(7);
  const UseRates rates = after(3000, [&](int) {
    std::vector<std::int32_t> needed;
    for (std::int32_t expert = 0; expert < static_cast<std::int32_t>(experts); ++expert)
      if (random() % experts < static_cast<std::uint32_t>(expert)) needed.push_back(expert);
    return needed;
  });
  for (const std::size_t expert : {2, 5, 9, 14})
    for (const std::int64_t passes : {1, 2, 5}) {
      CAPTURE(expert, passes);
      CHECK(std::abs(rates.chance(expert, passes) / rates.frequency(expert) - 1) < 0.2);
    }
}
