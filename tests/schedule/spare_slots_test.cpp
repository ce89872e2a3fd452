// SPDX-License-Identifier: Apache-2.0
//
// Slots that are spared from Belady's rule for experts that come early.

#include "sida/schedule/spare_slots.hpp"

#include "support/catch.hpp"

using namespace sida;

namespace {

SpareSlots starved(int layers) {
  SpareSlots spare;
  for (int layer = 0; layer < layers; ++layer) spare.begin_layer(true);
  return spare;
}

}  // namespace

TEST_CASE("Slots are spared only after a layer waited while the link was idle", "[spare]") {
  SpareSlots spare;
  for (int layer = 0; layer < 10; ++layer) spare.begin_layer(false);
  CHECK(spare.share(0) == 0);
  spare.begin_layer(true);
  CHECK(spare.share(0) == Approx(0.1));
}

TEST_CASE("At most half of the slots are spared", "[spare]") {
  CHECK(starved(1000).share(0) == Approx(0.5));
}

TEST_CASE("Spared slots are given back where no layer waits", "[spare]") {
  SpareSlots spare = starved(3);
  spare.begin_layer(false);
  CHECK(spare.share(0) == Approx(0.29));
  for (int layer = 0; layer < 100; ++layer) spare.begin_layer(false);
  CHECK(spare.share(0) == 0);
}

TEST_CASE("The more loads are too many the fewer slots are spared", "[spare]") {
  const SpareSlots spare = starved(4);
  CHECK(spare.share(-0.5) == Approx(0.4));
  CHECK(spare.share(LoadExcess::allowed / 2) == Approx(0.4));
  CHECK(spare.share(LoadExcess::allowed * 3 / 4) == Approx(0.2));
  CHECK(spare.share(LoadExcess::allowed) == 0);
  CHECK(spare.share(1) == 0);
}
