// SPDX-License-Identifier: Apache-2.0
#include "sida/hash/hash_predictor_cpu.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <utility>

using Predictor = sida::HashPredictor<sida::CpuBackend>;

namespace {

Predictor make_predictor(sida::PredictorWeights weights) { return Predictor(std::move(weights)); }
bool can_run() { return true; }

}  // namespace

#include "hash/predictor_contract.hpp"
#include "support/machine_isas.hpp"

TEST_CASE("Every instruction set agrees with the reference, with and without whole vectors") {
  for (const sida::Isa isa : sida::test::machine_isas())
    for (const std::string& kind : kinds)
      for (const std::int32_t hidden : {32, 40}) {
        CAPTURE(name_of(isa), kind, hidden);
        const auto weights = reference::random_weights(kind, 37, hidden, 11);
        const Batch batch = random_batch(60, 3, 37);
        const Predictor predictor(weights, isa);
        check_against_reference(weights, batch, predictor.predict(batch.view(), batch.mask, 0));
      }
}

TEST_CASE("NaN in a sentence reaches no other, whatever the instruction set") {
  for (const sida::Isa isa : sida::test::machine_isas())
    for (const std::string& kind : kinds) {
      CAPTURE(name_of(isa), kind);
      const Predictor predictor(reference::random_weights(kind, 37, 40, 11), isa);
      Batch batch = random_batch(5, 3, 37, false);
      const HashTable clean = predictor.predict(batch.view(), {}, 0);
      std::fill_n(batch.token(3), 37, std::numeric_limits<float>::quiet_NaN());
      const HashTable table = predictor.predict(batch.view(), {}, 0);
      for (std::int64_t token = 0; token < 15; ++token) {
        const std::size_t at = table.index(1, token, 0);
        CHECK(std::isnan(table.scale[at]) == (token == 3 || (kind != "token" && token / 3 == 1)));
        if (token / 3 != 1) CHECK(table.scale[at] == clean.scale[at]);
      }
    }
}

TEST_CASE("An instruction set that this processor lacks is refused") {
  REQUIRE_THROWS_WITH(
      Predictor(reference::random_weights("token", 4, 8, 3), sida::Isa{99}),
      Catch::Matchers::ContainsSubstring("isa: expected one that this processor runs"));
}
