// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cuda/device.hpp"
#include "sida/hash/hash_predictor_cpu.hpp"
#include "sida/hash/hash_predictor_cuda.hpp"
#include "sida/io/predictor_file.hpp"

using Predictor = sida::HashPredictor<sida::CudaBackend>;

namespace {

Predictor make_predictor(sida::PredictorWeights weights) {
  return {sida::CudaBackend(), std::move(weights)};
}
bool can_run() { return sida::test::gpu_found(); }

}  // namespace

#include "hash/predictor_contract.hpp"

namespace {

std::vector<std::byte> bytes_of(const std::vector<float>& values) {
  std::vector<std::byte> bytes(values.size() * sizeof(float));
  std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

double worst_difference(const std::vector<float>& a, const std::vector<float>& b) {
  REQUIRE(a.size() == b.size());
  double worst = 0;
  for (std::size_t i = 0; i < a.size(); ++i)
    worst = std::max(worst, std::abs(static_cast<double>(a[i]) - static_cast<double>(b[i])));
  return worst;
}

// The CPU's table, and the GPU's of the same embeddings: first sentences, longer ones, whole tiles.
void check_against_cpu(const std::string& kind, std::int32_t size, std::int32_t hidden,
                       std::int32_t experts, std::int64_t sentences, std::int64_t length) {
  const auto weights = reference::random_weights(kind, size, hidden, experts);
  const Batch batch = random_batch(sentences, length, size);
  const HashTable expected =
      sida::HashPredictor<sida::CpuBackend>(weights).predict(batch.view(), batch.mask, 5, experts);
  const HashTable table = make_predictor(weights).predict(batch.view(), batch.mask, 5, experts);
  // Among experts as good as equal the order may differ: what each is given is compared.
  double worst = 0;
  for (std::size_t first = 0; first < table.ids.size();
       first += static_cast<std::size_t>(experts)) {
    std::vector<std::array<float, 2>> wanted(static_cast<std::size_t>(experts));
    for (std::size_t i = first; i < first + static_cast<std::size_t>(experts); ++i) {
      REQUIRE((expected.ids[i] < 0) == (table.ids[i] < 0));
      if (expected.ids[i] >= 0)
        wanted[static_cast<std::size_t>(expected.ids[i])] = {expected.probs[i], expected.scale[i]};
    }
    for (std::size_t i = first; i < first + static_cast<std::size_t>(experts); ++i) {
      if (table.ids[i] < 0) continue;
      const auto& [prob, scale] = wanted[static_cast<std::size_t>(table.ids[i])];
      worst = std::max<double>(worst, std::abs(table.probs[i] - prob));
      worst = std::max<double>(worst, std::abs(table.scale[i] - scale));
    }
  }
  CAPTURE(kind, size, hidden, experts, sentences, length, worst);
  CHECK(worst < 1e-4);
}

}  // namespace

TEST_CASE("On the GPU predictors of the size that is trained foretell what they do on the CPU",
          "[predictor]") {
  if (!can_run()) return;
  for (const std::string& kind : kinds) {
    check_against_cpu(kind, 768, 256, 128, 9, 50);
    check_against_cpu(kind, 100, 256, 33, 1, 700);  // more than a tile of anything
    check_against_cpu(kind, 64, 248, 16, 70, 3);    // more sentences than go at once
    check_against_cpu(kind, 32, 512, 8, 17, 9);
  }
}

TEST_CASE("On the GPU batches that are worked on piece by piece foretell the same", "[predictor]") {
  if (!can_run()) return;
  for (const std::string& kind : kinds) check_against_cpu(kind, 8, 16, 5, 700, 13);
}

TEST_CASE("Embeddings on the GPU are read there, behind the caller's stream", "[predictor]") {
  if (!can_run()) return;
  sida::CudaBackend backend;
  for (const std::string& kind : kinds) {
    const Predictor predictor = make_predictor(reference::random_weights(kind, 12, 16, 10));
    const Batch batch = random_batch(7, 9, 12);
    const HashTable expected = predictor.predict(batch.view(), batch.mask, 3);
    sida::test::DeviceBuffer source, embeddings;
    source.fill(bytes_of(batch.embeddings));
    embeddings.poison(batch.embeddings.size() * sizeof(float));
    auto stream = backend.make_stream();
    // Long copies first, so that who does not wait reads what was there before.
    sida::test::DeviceBuffer from, to;
    from.poison(std::size_t{512} << 20);
    to.poison(std::size_t{512} << 20);
    for (int copy = 0; copy < 8; ++copy)
      backend.copy_async(to.data(), from.data(), std::size_t{512} << 20, stream);
    backend.copy_async(embeddings.data(), source.data(), batch.embeddings.size() * sizeof(float),
                       stream);
    auto view = batch.view();
    view.data = embeddings.data();
    const HashTable table = predictor.predict(view, batch.mask, 3, 8, stream.native());
    CHECK(table.ids == expected.ids);
    CHECK(worst_difference(table.probs, expected.probs) == 0);
    CHECK(predictor.workspace_bytes() > 0);
  }
}

TEST_CASE("States on the GPU are taken up and written there", "[predictor][racecheck]") {
  if (!can_run()) return;
  const Predictor predictor = make_predictor(reference::random_weights("causal_lstm", 12, 16, 10));
  const std::int64_t size = predictor.state_size();
  const Batch batch = random_batch(5, 6, 12), next = random_batch(5, 4, 12);
  std::vector<float> in_ram(static_cast<std::size_t>(5 * 6 * size), -7.0f);
  const auto none = sida::ConstTensorView{nullptr, sida::DataType::f32, {5, 0, size}};
  predictor.advance(
      batch.view(), batch.mask, none,
      {reinterpret_cast<std::byte*>(in_ram.data()), sida::DataType::f32, {5, 6, size}}, 0);
  sida::test::DeviceBuffer past, states;
  past.poison(in_ram.size() * sizeof(float));
  predictor.advance(batch.view(), batch.mask, none,
                    {past.data(), sida::DataType::f32, {5, 6, size}}, 0);
  std::vector<float> read(in_ram.size());
  sida::test::copy_to_host(read.data(), past.data(), read.size() * sizeof(float));
  CHECK(worst_difference(read, in_ram) == 0);

  std::vector<float> latest(static_cast<std::size_t>(5 * 4 * size), -7.0f);
  const HashTable expected = predictor.advance(
      next.view(), next.mask,
      {reinterpret_cast<const std::byte*>(in_ram.data()), sida::DataType::f32, {5, 6, size}},
      {reinterpret_cast<std::byte*>(latest.data()), sida::DataType::f32, {5, 4, size}}, 1);
  states.poison(latest.size() * sizeof(float));
  const HashTable table =
      predictor.advance(next.view(), next.mask, {past.data(), sida::DataType::f32, {5, 6, size}},
                        {states.data(), sida::DataType::f32, {5, 4, size}}, 1);
  CHECK(table.ids == expected.ids);
  CHECK(worst_difference(table.probs, expected.probs) == 0);
  std::vector<float> written(latest.size());
  sida::test::copy_to_host(written.data(), states.data(), written.size() * sizeof(float));
  CHECK(worst_difference(written, latest) == 0);
}

TEST_CASE("On the GPU a sentence's table has the same bits in any batch and every time",
          "[predictor]") {
  if (!can_run()) return;
  for (const std::string& kind : kinds) {
    const Predictor predictor = make_predictor(reference::random_weights(kind, 40, 256, 12));
    const Batch batch = random_batch(40, 30, 40);
    const HashTable whole = predictor.predict(batch.view(), batch.mask, 0);
    for (int turn = 0; turn < 5; ++turn) {
      const HashTable again = predictor.predict(batch.view(), batch.mask, 0);
      CHECK(again.ids == whole.ids);
      CHECK(again.probs == whole.probs);
      CHECK(again.scale == whole.scale);
    }
    for (const std::int64_t s : {0, 17, 39}) {
      auto view = batch.view();
      view.data += s * 30 * 40 * 4;
      view.shape[0] = 1;
      const std::vector<std::uint8_t> mask(batch.mask.begin() + s * 30,
                                           batch.mask.begin() + (s + 1) * 30);
      const HashTable alone = predictor.predict(view, mask, 0);
      for (const std::int32_t layer : {1, 4}) {
        const auto begin = static_cast<std::ptrdiff_t>(whole.index(layer, s * 30, 0));
        const auto from = static_cast<std::ptrdiff_t>(alone.index(layer, 0, 0));
        CHECK(std::equal(alone.probs.begin() + from, alone.probs.begin() + from + 240,
                         whole.probs.begin() + begin));
      }
    }
  }
}

TEST_CASE("Predictors trained in PyTorch foretell the same on the GPU", "[predictor]") {
  if (!can_run()) return;
  for (const std::string& kind : kinds) {
    CAPTURE(kind);
    const std::string path = std::string(SIDA_TEST_DATA) + "/predictor_" + kind;
    const Predictor predictor = make_predictor(sida::load_predictor(path + ".safetensors"));
    const auto expected = sida::SafetensorsFile::open(path + "_expected.safetensors");
    const auto embeddings = sida::read_values<float>(expected, "embeddings");
    const auto tokens = sida::read_values<std::int32_t>(expected, "mask");
    const std::vector<std::uint8_t> mask(tokens.begin(), tokens.end());
    const HashTable table =
        predictor.predict({reinterpret_cast<const std::byte*>(embeddings.data()),
                           sida::DataType::f32, expected.tensor("embeddings").shape},
                          mask, 0, 4);
    CHECK(table.ids == sida::read_values<std::int32_t>(expected, "ids"));
    CHECK(worst_difference(table.probs, sida::read_values<float>(expected, "probs")) < 1e-4);
    CHECK(worst_difference(table.scale, sida::read_values<float>(expected, "scale")) < 1e-4);
  }
}

TEST_CASE("A hidden size that the GPU has no room for is refused by name", "[predictor]") {
  if (!can_run()) return;
  REQUIRE_THROWS_WITH(make_predictor(reference::random_weights("lstm", 4, 3000, 3)),
                      Catch::Matchers::ContainsSubstring("hidden_size 3000 is too large"));
}
