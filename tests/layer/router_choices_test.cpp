// SPDX-License-Identifier: Apache-2.0
#include "sida/layer/router_choices.hpp"

#include <cstdint>
#include <utility>
#include <vector>

#include "support/backends.hpp"
#include "support/catch.hpp"
#include "support/layers.hpp"

namespace sida::test {
namespace {

/// [tokens, 2] ids.
template <class Id>
ConstTensorView view_of(const std::vector<Id>& ids, std::int64_t tokens) {
  const DataType type = sizeof(Id) == 4 ? DataType::i32 : DataType::i64;
  return {std::as_bytes(std::span(ids)).data(),
          type,
          {tokens, static_cast<std::int64_t>(ids.size()) / tokens}};
}

std::vector<std::pair<std::int32_t, std::int32_t>> pairs(const std::vector<RouterChoice>& choices) {
  std::vector<std::pair<std::int32_t, std::int32_t>> found;
  for (const RouterChoice& choice : choices) found.emplace_back(choice.expert, choice.rank);
  return found;
}

}  // namespace

TEMPLATE_TEST_CASE(
    "Each expert is named once, with its best rank, padding and ids out of range "
    "left out",
    "[look-ahead]", std::int32_t, std::int64_t) {
  const std::vector<TestType> ids = {3, 1, 2, 3, 1, 5, 4, -1, 6, 0};
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1};
  using Pairs = std::vector<std::pair<std::int32_t, std::int32_t>>;
  CHECK(pairs(choices_of(view_of(ids, 5), mask, 6)) ==
        Pairs{{3, 0}, {2, 0}, {4, 0}, {1, 1}, {0, 1}});
  CHECK(pairs(choices_of(view_of(ids, 5), {}, 6)) ==
        Pairs{{3, 0}, {2, 0}, {1, 0}, {4, 0}, {5, 1}, {0, 1}});
  CHECK(choices_of(view_of(std::vector<TestType>{}, 1), {}, 6).empty());
}

TEMPLATE_LIST_TEST_CASE("Look-ahead, right or wrong, changes no bit, and right it saves misses",
                        "[look-ahead][bits]", Engines) {
  using Engine = Layers<typename TestType::backend, typename TestType::policy>;
  const Model model;
  const auto expected = Default(model, Budget::fraction(1)).pass();
  for (const int slots : {1, 3, 7, 12}) {
    Engine without(model, Budget::experts(slots));
    for (const std::int32_t shift : {0, 1, 3}) {
      Engine engine(model, Budget::experts(slots));
      engine.look_ahead = shift;
      for (int pass = 0; pass < 3; ++pass) REQUIRE(engine.pass() == expected);
      const auto stats = engine.scheduler->stats();
      CHECK(stats.total.hits + stats.total.late + stats.total.misses == stats.total.uses);
      CHECK(stats.layers[0].look_ahead.uses == 0);
      CHECK(stats.layers[1].look_ahead.uses == stats.layers[1].uses);
      if (shift != 0) continue;
      CHECK(stats.total.look_ahead.foretold_uses == stats.total.look_ahead.foretold);
      CHECK(stats.total.look_ahead.foretold_uses == stats.total.look_ahead.uses);
      CHECK(stats.layers[1].misses + stats.layers[2].misses == 0);  // all were asked for before
      CHECK(stats.layers[1].late + stats.layers[1].hits == stats.layers[1].uses);
    }
  }
}

TEST_CASE("Ids for the next layer that are none are refused before anything happens",
          "[look-ahead]") {
  const Model model;
  Default engine(model, Budget::experts(3));
  engine.scheduler->begin_pass({}, 0, {});
  const LayerInput& input = model.inputs[0];
  Tensor out(input.hidden.shape, model.config.dtype);
  const auto call = [&](std::size_t layer, const ConstTensorView& next) {
    engine.layers[layer].forward(input.hidden.view(), input.ids.view(), input.weights.view(),
                                 out.mutable_view(), next);
  };
  ConstTensorView short_ids = input.ids.view();
  short_ids.shape[0] -= 1;
  CHECK_THROWS_AS(call(0, short_ids), InvalidArgument);
  CHECK_THROWS_AS(call(0, input.weights.view()), InvalidArgument);
  CHECK_THROWS_AS(call(2, input.ids.view()), InvalidArgument);
  CHECK(engine.scheduler->stats().total.calls == 0);
  call(0, input.ids.view());
  CHECK(engine.layers[1].wants_look_ahead());
  CHECK(!engine.layers[2].wants_look_ahead());
}

}  // namespace sida::test
