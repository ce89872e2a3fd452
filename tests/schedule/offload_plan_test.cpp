// SPDX-License-Identifier: Apache-2.0
#include "sida/schedule/offload_plan.hpp"

#include "support/catch.hpp"

using namespace sida;

namespace {

// One layer, tokens with two candidates each.
HashTable table(std::vector<std::int32_t> ids, std::vector<float> probs) {
  HashTable t;
  t.layers = 1;
  t.candidates = 2;
  t.keys = {0};
  t.offsets = {0, static_cast<std::int64_t>(ids.size()) / 2};
  t.ids = std::move(ids);
  t.probs = std::move(probs);
  t.scale.assign(t.ids.size(), 1.0F);
  return t;
}

}  // namespace

TEST_CASE("A batch wants an expert with 1 - prod(1 - p) over its tokens", "[plan]") {
  const auto plan =
      plan_uses(table({0, 1, 0, 2, 1, 2}, {0.5F, 0.25F, 0.5F, 0.25F, 0.5F, 0.1F}), 3, 10, 0.0);
  REQUIRE(plan.size() == 3);
  CHECK(plan[0].id == ExpertId{0, 0});
  CHECK(plan[0].probability == Approx(0.75));
  CHECK(plan[1].id == ExpertId{0, 1});
  CHECK(plan[1].probability == Approx(1 - 0.75 * 0.5));
  CHECK(plan[2].id == ExpertId{0, 2});
  CHECK(plan[2].probability == Approx(1 - 0.75 * 0.9));
  CHECK(plan[0].step == 10);
}

TEST_CASE("Experts below the threshold are left out, padding wants none", "[plan]") {
  const auto plan = plan_uses(table({0, 1, -1, -1}, {0.9F, 0.2F, 1.0F, 1.0F}), 2, 0, 0.3);
  REQUIRE(plan.size() == 1);
  CHECK(plan[0].id == ExpertId{0, 0});
}

TEST_CASE("Layers come in order, and equals in the order of their ids", "[plan]") {
  HashTable t;
  t.layers = 2;
  t.candidates = 1;
  t.keys = {0};
  t.offsets = {0, 2};
  t.ids = {2, 1, 0, 3};
  t.probs = {1, 1, 0.5F, 1};
  t.scale.assign(4, 1.0F);
  const auto plan = plan_uses(t, 4, 6, 0.3);
  REQUIRE(plan.size() == 4);
  CHECK(plan[0].id == ExpertId{0, 1});
  CHECK(plan[1].id == ExpertId{0, 2});
  CHECK(plan[2].id == ExpertId{1, 3});
  CHECK(plan[3].id == ExpertId{1, 0});
  CHECK(plan[1].step == 6);
  CHECK(plan[2].step == 7);
}
