// SPDX-License-Identifier: Apache-2.0
#include "sida/cache/use_forecast.hpp"

#include <cstdint>
#include <random>

#include "support/catch.hpp"

using namespace sida;

TEST_CASE("The next known use is the nearest step that is not over", "[forecast]") {
  UseForecast forecast(2, 4);
  const ExpertId id{1, 3};
  CHECK_FALSE(forecast.next_use(id));
  forecast.add(id, 7);
  forecast.add(id, 3);
  forecast.add(id, 5);
  CHECK(forecast.next_use(id) == 3);
  forecast.begin_pass(4);
  CHECK(forecast.next_use(id) == 5);
  CHECK(forecast.expected_use(id) == 5);
  CHECK(forecast.expected_use_after(id, 5) == 7);
}

TEST_CASE("Of what is foretold for one step the surer counts", "[forecast]") {
  UseForecast forecast(2, 4);
  const ExpertId id{1, 3};
  CHECK(forecast.probability_at(id, 3) == 0);
  forecast.add(id, 3, 0.25);
  forecast.add(id, 5, 0.75);
  forecast.add_guess(id, 3, 0.5);
  CHECK(forecast.probability_at(id, 3) == 0.5);
  CHECK(forecast.next_use(id, 0.4) == 3);
  forecast.add_guess(id, 5, 0.5);
  CHECK(forecast.probability_at(id, 5) == 0.75);
  CHECK(forecast.probability_at(id, 4) == 0);
  forecast.begin_pass(4);
  CHECK(forecast.next_use(id) == 5);
}

TEST_CASE("What a layer asks for replaces what was foretold", "[forecast]") {
  UseForecast forecast(2, 4);
  forecast.add({0, 0}, 2);
  forecast.add({0, 1}, 2);
  forecast.begin_pass(2);
  forecast.begin_layer(0, 2, {1, 2});
  CHECK_FALSE(forecast.next_use({0, 0}));
  CHECK(forecast.next_use({0, 1}) == 2);
  CHECK(forecast.next_use({0, 2}) == 2);

  SECTION("A use is over when its rows are done") {
    forecast.done({0, 1});
    CHECK_FALSE(forecast.next_use({0, 1}));
    CHECK(forecast.next_use({0, 2}) == 2);
  }
  SECTION("Later uses stay") {
    forecast.add({0, 1}, 4);
    forecast.done({0, 1});
    CHECK(forecast.next_use({0, 1}) == 4);
  }
}

TEST_CASE("Unknown uses lie beyond the known ones of their layer, the frequent ones nearer",
          "[forecast]") {
  UseForecast forecast(2, 3);
  for (UseForecast::Step pass = 1; pass <= 8; ++pass) {
    forecast.begin_pass(2 * pass);
    forecast.begin_layer(0, 2 * pass,
                         pass % 4 ? std::vector<std::int32_t>{0} : std::vector<std::int32_t>{0, 1});
    forecast.begin_layer(1, 2 * pass + 1, {2});
    forecast.done({1, 2});
  }
  // The last step was 17, of layer 1; layer 0 comes at 18.
  CHECK(forecast.expected_use({0, 0}) == Approx(18).margin(0.5));          // used in every pass
  CHECK(forecast.expected_use({0, 1}) == Approx(18 + 2 * 2.6).margin(1));  // in every fourth
  CHECK(forecast.expected_use({0, 2}) > forecast.expected_use({0, 1}));
  CHECK(forecast.expected_use({0, 0}) < forecast.expected_use({1, 2}));  // its layer comes later

  forecast.add({0, 2}, 24);
  CHECK(forecast.expected_use({0, 2}) == 24);
  CHECK(forecast.expected_use({0, 0}) >= 26);  // a table says what layer 0 needs at step 24
  CHECK(forecast.expected_use({1, 2}) == Approx(19).margin(0.5));  // but nothing of layer 1
}

TEST_CASE("Tables can be forgotten without what is nearer, or what was learnt", "[forecast]") {
  UseForecast forecast(1, 2);
  forecast.add({0, 0}, 1);
  forecast.add({0, 0}, 2);
  forecast.forget_from(2);
  CHECK(forecast.next_use({0, 0}) == 1);
  CHECK(forecast.expected_use_after({0, 0}, 1) >= 2);
  CHECK(forecast.expected_use({0, 1}) >= 2);
}

TEST_CASE("A use that is not sure is expected between its step and what comes after",
          "[forecast]") {
  UseForecast forecast(1, 3);
  forecast.advance(1);
  forecast.add({0, 0}, 2, 0.5);
  forecast.add({0, 0}, 10);
  // distances from step 0: 2 with probability 1/2, else 10
  CHECK(forecast.expected_use({0, 0}) == Approx(1 / (0.5 / 2 + 0.5 / 10)));
  CHECK(forecast.expected_use_after({0, 0}, 2) == 10);
  forecast.add({0, 1}, 2, 0.9);
  forecast.add({0, 2}, 3);
  CHECK(forecast.expected_use({0, 1}) < forecast.expected_use({0, 2}));
  CHECK(forecast.expected_use({0, 2}) < forecast.expected_use({0, 0}));
}

TEST_CASE("Whatever becomes known, the next use is the first one after the step before now",
          "[forecast]") {
  constexpr std::int32_t layers = 3, experts = 4;
  UseForecast forecast(layers, experts);
  std::mt19937 random(3);
  const auto draw = [&](int count) { return static_cast<std::int32_t>(random() % count); };
  UseForecast::Step step = 0;
  for (int i = 0; i < 3000; ++i) {
    const ExpertId id{draw(layers), draw(experts)};
    switch (draw(7)) {
      case 0:
        forecast.add(id, step - step % layers + draw(5) * layers + id.layer, 0.25 * (1 + draw(4)));
        break;
      case 1:
        forecast.add_guess(id, step - step % layers + layers + id.layer, 0.5);
        break;
      case 2:
        forecast.begin_layer(static_cast<std::int32_t>(step % layers), step, {draw(experts)});
        break;
      case 3:
        forecast.done(id);
        break;
      case 4:
        step += layers - step % layers;
        forecast.begin_pass(step);
        break;
      case 5:
        forecast.forget_from(step + layers);
        break;
      default:
        step += draw(2) * (step % layers + 1 < layers);
        forecast.advance(step);
    }
    for (std::int32_t e = 0; e < experts; ++e)
      REQUIRE(forecast.expected_use({id.layer, e}) ==
              forecast.expected_use_after({id.layer, e}, forecast.now() - 1));
  }
}
