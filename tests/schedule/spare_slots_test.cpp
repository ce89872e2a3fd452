// SPDX-License-Identifier: Apache-2.0
//
// Slots that are spared from Belady's rule for experts that come early.

#include "sida/schedule/spare_slots.hpp"

#include <cstdint>

#include "support/catch.hpp"

using namespace sida;

namespace {

constexpr std::int64_t slots = 100;

SpareSlots starved(int layers) {
  SpareSlots spare;
  for (int layer = 0; layer < layers; ++layer) spare.begin_layer(true, slots);
  return spare;
}

}  // namespace

TEST_CASE("Slots are spared only after a layer waited while the link was idle", "[spare]") {
  SpareSlots spare;
  for (int layer = 0; layer < 10; ++layer) spare.begin_layer(false, slots);
  CHECK(spare.count(0) == 0);
  spare.begin_layer(true, slots);
  CHECK(spare.count(0) == 10);
}

TEST_CASE("At most half of the slots are spared, and one of one never", "[spare]") {
  CHECK(starved(1000).count(0) == slots / 2);
  SpareSlots spare;
  for (int layer = 0; layer < 1000; ++layer) spare.begin_layer(true, 1);
  CHECK(spare.count(0) == 0);
}

TEST_CASE("Spared slots are given back where no layer waits", "[spare]") {
  SpareSlots spare = starved(3);
  spare.begin_layer(false, slots);
  CHECK(spare.count(0) == 29);
  for (int layer = 0; layer < 100; ++layer) spare.begin_layer(false, slots);
  CHECK(spare.count(0) == 0);
}

TEST_CASE("The more loads are too many the fewer slots are spared", "[spare]") {
  const SpareSlots spare = starved(4);
  CHECK(spare.count(-0.5) == 40);
  CHECK(spare.count(LoadExcess::allowed / 2) == 40);
  CHECK(spare.count(LoadExcess::allowed * 3 / 4) == 20);
  CHECK(spare.count(LoadExcess::allowed) == 0);
  CHECK(spare.count(1) == 0);
}

TEST_CASE("With fewer slots as many fewer are spared", "[spare]") {
  SpareSlots spare = starved(5);
  spare.begin_layer(true, 20);
  CHECK(spare.count(0) == 10);
}
