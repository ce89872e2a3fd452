// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "hash/reference_predictor.hpp"
#include "sida/core/error.hpp"
#include "sida/hash/hash_table.hpp"
#include "support/catch.hpp"

// What every HashPredictor does. A file that includes this one has said before what is tested:
// `Predictor`, `Predictor make_predictor(PredictorWeights)`, and `bool can_run()` on this machine.

using sida::HashTable;

namespace {

const std::vector<std::string> kinds{"lstm", "causal_lstm", "transformer", "token"};

struct Batch {
  std::int64_t sentences, length, size;
  std::vector<float> embeddings;
  std::vector<std::uint8_t> mask;

  sida::ConstTensorView view() const {
    return {reinterpret_cast<const std::byte*>(embeddings.data()),
            sida::DataType::f32,
            {sentences, length, size}};
  }
  float* token(std::int64_t i) { return embeddings.data() + i * size; }
};

/// Random sentences; a third of the positions are padding, wherever, and hold NaN.
Batch random_batch(std::int64_t sentences, std::int64_t length, std::int64_t size,
                   bool padded = true) {
  std::mt19937 generator(static_cast<unsigned>(sentences * 1000 + length));
  std::normal_distribution<float> normal;
  Batch batch{sentences, length, size, {}, {}};
  for (std::int64_t i = 0; i < sentences * length; ++i) {
    const bool token = !padded || generator() % 3 != 0;
    batch.mask.push_back(token);
    for (std::int64_t d = 0; d < size; ++d)
      batch.embeddings.push_back(token ? normal(generator)
                                       : std::numeric_limits<float>::quiet_NaN());
  }
  return batch;
}

/// Compares every number of the table with the reference.
void check_against_reference(const sida::PredictorWeights& weights, const Batch& batch,
                             const HashTable& table) {
  REQUIRE(table.layers == weights.layers);
  REQUIRE(table.tokens() == batch.sentences * batch.length);
  REQUIRE_NOTHROW(table.validate(weights.experts));
  double worst = 0;
  for (std::int64_t s = 0; s < batch.sentences; ++s) {
    std::vector<std::int64_t> tokens;
    reference::Vectors sentence;
    for (std::int64_t i = s * batch.length; i < (s + 1) * batch.length; ++i) {
      if (!batch.mask[static_cast<std::size_t>(i)]) {
        for (std::int32_t layer = 0; layer < table.layers; ++layer)
          for (std::int32_t c = 0; c < table.candidates; ++c)
            REQUIRE(table.ids[table.index(layer, i, c)] == -1);
        continue;
      }
      tokens.push_back(i);
      const auto begin = batch.embeddings.begin() + i * batch.size;
      sentence.emplace_back(begin, begin + batch.size);
    }
    const auto expected = reference::predict(weights, sentence);
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      REQUIRE(table.ids[table.index(0, tokens[i], 0)] == -1);
      for (std::size_t head = 0; head < weights.heads.size(); ++head) {
        const std::size_t at = table.index(weights.heads[head], tokens[i], 0);
        auto falling = expected[i].probs[head];
        std::sort(falling.rbegin(), falling.rend());
        for (std::size_t c = 0; c < static_cast<std::size_t>(table.candidates); ++c) {
          const auto id = static_cast<std::size_t>(table.ids[at + c]);
          // Each candidate's own numbers are right, and it is as probable as its place asks for.
          for (const double difference :
               {expected[i].probs[head][id] - table.probs[at + c], falling[c] - table.probs[at + c],
                expected[i].scales[head][id] - table.scale[at + c]})
            worst = std::max(worst, std::abs(difference));
        }
      }
    }
  }
  CAPTURE(weights.kind, worst);
  CHECK(worst < 1e-5);
}

}  // namespace

TEST_CASE("Predictions agree with an f64 reference, wherever the padding is", "[predictor]") {
  if (!can_run()) return;
  for (const std::string& kind : kinds) {
    const auto weights = reference::random_weights(kind, 12, 16, 10);
    const Predictor predictor = make_predictor(weights);
    for (const auto& [sentences, length] : {std::pair{1, 1}, {1, 40}, {7, 9}, {20, 3}}) {
      const Batch batch = random_batch(sentences, length, 12);
      const HashTable table = predictor.predict(batch.view(), batch.mask, 42);
      REQUIRE(table.keys == std::vector<std::uint64_t>{42});
      REQUIRE(table.candidates == 8);
      check_against_reference(weights, batch, table);
    }
  }
}

TEST_CASE("Predictions of long sentences and large batches agree with the reference",
          "[predictor]") {
  if (!can_run()) return;
  for (const std::string& kind : kinds) {
    const auto weights = reference::random_weights(kind, 4, 8, 3);
    const Predictor predictor = make_predictor(weights);
    for (const auto& [sentences, length] : {std::pair{2, 300}, {120, 30}}) {
      const Batch batch = random_batch(sentences, length, 4);
      check_against_reference(weights, batch, predictor.predict(batch.view(), batch.mask, 0, 99));
    }
  }
}

TEST_CASE("An empty mask means that all positions are tokens", "[predictor]") {
  if (!can_run()) return;
  for (const std::string& kind : kinds) {
    const Predictor predictor = make_predictor(reference::random_weights(kind, 4, 8, 3));
    const Batch batch = random_batch(3, 5, 4, false);
    const HashTable with = predictor.predict(batch.view(), batch.mask, 1);
    const HashTable without = predictor.predict(batch.view(), {}, 1);
    REQUIRE(with.ids == without.ids);
    REQUIRE(with.probs == without.probs);
    REQUIRE(with.scale == without.scale);
  }
}

TEST_CASE("Batches without tokens give tables without predictions", "[predictor]") {
  if (!can_run()) return;
  for (const std::string& kind : kinds) {
    const Predictor predictor = make_predictor(reference::random_weights(kind, 4, 8, 3));
    for (const auto& [sentences, length] : {std::pair{0, 5}, {5, 0}, {0, 0}}) {
      const Batch batch{sentences, length, 4, {}, {}};
      const HashTable table = predictor.predict(batch.view(), {}, 1);
      REQUIRE(table.tokens() == 0);
      REQUIRE_NOTHROW(table.validate());
    }
    Batch padding = random_batch(2, 3, 4);
    std::fill(padding.mask.begin(), padding.mask.end(), std::uint8_t{0});
    const HashTable table = predictor.predict(padding.view(), padding.mask, 1);
    REQUIRE(std::count(table.ids.begin(), table.ids.end(), -1) == 5 * 6 * 3);
  }
}

TEST_CASE("Among equally probable experts the lower id comes first", "[predictor]") {
  if (!can_run()) return;
  auto weights = reference::random_weights("token", 4, 8, 12);
  for (const std::string name : {"routing.weight", "routing.bias"})
    std::fill(weights.tensors[name].values.begin(), weights.tensors[name].values.end(), 0.0f);
  weights.tensors["routing.bias"].values[7] = 1.0f;    // first head
  weights.tensors["routing.bias"].values[12] = -1.0f;  // second head, its expert 0
  const Batch batch = random_batch(1, 1, 4, false);
  const HashTable table = make_predictor(weights).predict(batch.view(), {}, 0, 5);
  const auto ids = [&](std::int32_t layer) {
    const auto begin = table.ids.begin() + static_cast<std::ptrdiff_t>(table.index(layer, 0, 0));
    return std::vector<std::int32_t>(begin, begin + 5);
  };
  REQUIRE(ids(1) == std::vector<std::int32_t>{7, 0, 1, 2, 3});
  REQUIRE(ids(4) == std::vector<std::int32_t>{1, 2, 3, 4, 5});
}

TEST_CASE("Embeddings that are not finite spoil their own sentence at most", "[predictor]") {
  if (!can_run()) return;
  for (const std::string& kind : kinds) {
    const Predictor predictor = make_predictor(reference::random_weights(kind, 4, 8, 30));
    const Batch sound = random_batch(3, 6, 4, false);
    const HashTable expected = predictor.predict(sound.view(), {}, 0);
    for (const float bad :
         {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), 3e38f}) {
      Batch batch = sound;
      for (std::int64_t d = 0; d < 4; ++d) batch.token(6 + 2)[d] = bad;
      const HashTable table = predictor.predict(batch.view(), {}, 0);
      REQUIRE_NOTHROW(table.validate(30));
      for (std::int64_t token = 0; token < 18; ++token) {
        const std::size_t at = table.index(1, token, 0);
        if (token / 6 == 1) {
          REQUIRE(table.ids[at] >= 0);
          REQUIRE((table.probs[at] > 0) != std::isnan(table.scale[at]));
        } else {
          REQUIRE(table.ids[at] == expected.ids[at]);
          REQUIRE(table.probs[at] == Approx(expected.probs[at]).margin(1e-6));
        }
      }
      if (!std::isnan(bad)) continue;
      REQUIRE(std::isnan(table.scale[table.index(1, 8, 0)]));
      // Attention carries it to the whole sentence.
      for (std::int64_t token = 6; token < 12; ++token)
        REQUIRE(std::isnan(table.scale[table.index(1, token, 0)]) ==
                (kind == "token" ? token == 8 : kind != "causal_lstm" || token >= 8));
    }
  }
}

TEST_CASE("A causal predictor goes on from its states as if it had seen all at once",
          "[predictor]") {
  if (!can_run()) return;
  for (const std::string kind : {"causal_lstm", "token"}) {
    const auto weights = reference::random_weights(kind, 5, 8, 12);
    const Predictor predictor = make_predictor(weights);
    REQUIRE(predictor.is_causal());
    const std::int64_t size = predictor.state_size();
    REQUIRE(size == (kind == "token" ? 0 : 1 + 4 * 8));
    constexpr std::int64_t sentences = 6, length = 23;
    const Batch batch = random_batch(sentences, length, 5);
    const HashTable whole = predictor.predict(batch.view(), batch.mask, 0);
    std::vector<float> past;  // [sentences, begin, size]
    for (std::int64_t begin = 0, step = 1; begin < length; begin += step, step = step % 4 + 1) {
      const std::int64_t count = std::min(step, length - begin);
      Batch latest{sentences, count, 5, {}, {}};
      for (std::int64_t s = 0; s < sentences; ++s)
        for (std::int64_t i = s * length + begin; i < s * length + begin + count; ++i) {
          latest.mask.push_back(batch.mask[static_cast<std::size_t>(i)]);
          const auto from = batch.embeddings.begin() + i * 5;
          latest.embeddings.insert(latest.embeddings.end(), from, from + 5);
        }
      std::vector<float> states(static_cast<std::size_t>(sentences * count * size), -7.0f);
      const HashTable table = predictor.advance(latest.view(), latest.mask,
                                                {reinterpret_cast<const std::byte*>(past.data()),
                                                 sida::DataType::f32,
                                                 {sentences, begin, size}},
                                                {reinterpret_cast<std::byte*>(states.data()),
                                                 sida::DataType::f32,
                                                 {sentences, count, size}},
                                                3);
      REQUIRE(table.keys == std::vector<std::uint64_t>{3});
      for (std::int32_t layer = 0; layer < table.layers; ++layer)
        for (std::int64_t s = 0; s < sentences; ++s)
          for (std::int64_t i = 0; i < count; ++i)
            for (std::int32_t c = 0; c < table.candidates; ++c) {
              const std::size_t at = table.index(layer, s * count + i, c);
              const std::size_t wanted = whole.index(layer, s * length + begin + i, c);
              REQUIRE(table.ids[at] == whole.ids[wanted]);
              REQUIRE(table.probs[at] == Approx(whole.probs[wanted]).margin(1e-6));
              REQUIRE(table.scale[at] == Approx(whole.scale[wanted]).margin(1e-6));
            }
      std::vector<float> joined;
      const auto append = [&](const std::vector<float>& part, std::int64_t s, std::int64_t tokens) {
        const auto from = part.begin() + s * tokens * size;
        joined.insert(joined.end(), from, from + tokens * size);
      };
      for (std::int64_t s = 0; s < sentences; ++s) {
        append(past, s, begin);
        append(states, s, count);
      }
      past = joined;
    }
  }
}

TEST_CASE("What cannot go on is refused", "[predictor]") {
  if (!can_run()) return;
  const auto refuses = [](const std::string& kind, std::vector<std::int64_t> past,
                          std::vector<std::int64_t> states) {
    const Predictor predictor = make_predictor(reference::random_weights(kind, 4, 8, 3));
    const Batch batch = random_batch(2, 3, 4);
    std::vector<float> memory(2 * 5 * 33);
    auto* const data = reinterpret_cast<std::byte*>(memory.data());
    CHECK_THROWS_AS(
        predictor.advance(batch.view(), batch.mask, {data, sida::DataType::f32, std::move(past)},
                          {data, sida::DataType::f32, std::move(states)}, 0),
        sida::InvalidArgument);
  };
  refuses("lstm", {2, 0, 0}, {2, 3, 0});
  refuses("transformer", {2, 0, 0}, {2, 3, 0});
  refuses("causal_lstm", {2, 0, 32}, {2, 3, 33});
  refuses("causal_lstm", {1, 5, 33}, {2, 3, 33});
  refuses("causal_lstm", {2, 5, 33}, {2, 2, 33});
  refuses("causal_lstm", {2, 5}, {2, 3, 33});
  refuses("token", {2, 0, 33}, {2, 3, 0});
}

TEST_CASE("One predictor serves several threads, and its copies outlive it", "[predictor]") {
  if (!can_run()) return;
  for (const std::string& kind : kinds) {
    auto predictor =
        std::make_unique<Predictor>(make_predictor(reference::random_weights(kind, 4, 8, 3)));
    const Batch batch = random_batch(4, 20, 4);
    const HashTable expected = predictor->predict(batch.view(), batch.mask, 0);
    std::vector<HashTable> tables(4);
    {
      const Predictor copy = *predictor;
      predictor.reset();
      std::vector<std::jthread> threads;
      for (HashTable& table : tables)
        threads.emplace_back([&] { table = copy.predict(batch.view(), batch.mask, 0); });
    }
    for (const HashTable& table : tables) REQUIRE(table.probs == expected.probs);
  }
}

TEST_CASE("Weights that do not fit together are refused by name", "[predictor]") {
  if (!can_run()) return;
  using Catch::Matchers::ContainsSubstring;
  const auto refused = [](auto change, const std::string& message) {
    auto weights = reference::random_weights("lstm", 4, 8, 3);
    change(weights);
    REQUIRE_THROWS_WITH(make_predictor(weights), ContainsSubstring(message));
    REQUIRE_THROWS_AS(make_predictor(weights), sida::InvalidArgument);
  };
  using Weights = sida::PredictorWeights;
  refused([](Weights& w) { w.kind = "oracle"; }, "'oracle'");
  refused([](Weights& w) { w.kind = "token"; }, "expected no tensor 'lstm.bias_hh_l0'");
  refused([](Weights& w) { w.kind = "transformer"; }, "blocks.0.attention_norm.weight");
  refused([](Weights& w) { w.tensors.erase("residual.bias"); },
          "expected a tensor 'residual.bias' of shape [8], found none");
  refused([](Weights& w) { w.experts = 4; },
          "expected a tensor 'routing.weight' of shape [8, 8], got [6, 8]");
  refused([](Weights& w) { w.tensors["scale.weight"].values.pop_back(); }, "got 47 values");
  refused([](Weights& w) { w.tensors["scale.weight"].values.resize(480); }, "got 480 values");
  refused([](Weights& w) { w.tensors["scale.weight"].values.clear(); }, "got 0 values");
  refused([](Weights& w) { w.hidden_size = std::numeric_limits<std::int32_t>::max(); },
          "2147483647], got [6, 8]");
  refused([](Weights& w) { w.hidden_size = 0; }, "expected hidden_size > 0, got 0");
  refused([](Weights& w) { w.heads = {}; }, "expected one head or more");
  refused([](Weights& w) { w.heads = {1, 5}; }, "expected heads of layers 0 to 4");
  refused([](Weights& w) { w.heads = {4, 1}; }, "rising order, got 1 after 4");
  refused([](Weights& w) { w.heads = {-1, 1}; }, "got -1");
  refused([](Weights& w) { w.scale_factor = std::numeric_limits<float>::infinity(); },
          "scale_factor");
  REQUIRE_THROWS_WITH(make_predictor(reference::random_weights("transformer", 4, 12, 3)),
                      ContainsSubstring("multiple of 8, got 12"));
}

TEST_CASE("Arguments that do not fit the predictor are refused by name", "[predictor]") {
  if (!can_run()) return;
  using Catch::Matchers::ContainsSubstring;
  const Predictor predictor = make_predictor(reference::random_weights("token", 4, 8, 3));
  const Batch batch = random_batch(2, 3, 4);
  auto view = batch.view();
  REQUIRE_THROWS_WITH(predictor.predict(view, std::vector<std::uint8_t>(5), 0),
                      ContainsSubstring("mask of 6 elements or none, got 5"));
  REQUIRE_THROWS_WITH(predictor.predict(view, {}, 0, 0), ContainsSubstring("max_candidates >= 1"));
  view.type = sida::DataType::bf16;
  REQUIRE_THROWS_WITH(predictor.predict(view, {}, 0), ContainsSubstring("[B, S, 4] f32"));
  view.type = sida::DataType::f32;
  view.shape = {2, 4, 3};
  REQUIRE_THROWS_WITH(predictor.predict(view, {}, 0), ContainsSubstring("got [2, 4, 3] f32"));
  view.shape = {6, 4};
  REQUIRE_THROWS_WITH(predictor.predict(view, {}, 0), ContainsSubstring("got [6, 4] f32"));
  view.shape = {-1, -6, 4};
  REQUIRE_THROWS_WITH(predictor.predict(view, {}, 0), ContainsSubstring("B and S >= 0"));
}
