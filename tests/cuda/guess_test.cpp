// SPDX-License-Identifier: Apache-2.0
#include "guess.hpp"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <deque>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "cuda/device.hpp"
#include "cuda/layers_on_gpu.hpp"
#include "support/catch.hpp"
#include "support/layers.hpp"

using namespace sida;
using namespace sida::test;

namespace {

cuda::Dtype of_kernels(DataType type) {
  return type == DataType::f32   ? cuda::Dtype::f32
         : type == DataType::f16 ? cuda::Dtype::f16
                                 : cuda::Dtype::bf16;
}

Tensor random_tensor(std::vector<std::int64_t> shape, DataType type, std::mt19937& random) {
  Tensor tensor(std::move(shape), type);
  std::normal_distribution<double> normal;
  for (std::int64_t i = 0; i < tensor.elements(); ++i) tensor.set(i, normal(random));
  return tensor;
}

/// A router and what it is asked on, in RAM.
struct Asked {
  Asked(std::int64_t tokens, std::int64_t experts, std::int64_t size, DataType dtype,
        DataType weight_dtype, std::uint32_t seed)
      : random(seed),
        hidden(random_tensor({tokens, size}, dtype, random)),
        weight(random_tensor({experts, size}, weight_dtype, random)),
        bias(random_tensor({experts}, DataType::f32, random)),
        correction(random_tensor({experts}, DataType::f32, random)) {}

  /// What is compared, in float64.
  std::vector<double> scores(std::int64_t token, bool has_bias, bool is_corrected) const {
    const std::int64_t size = hidden.shape[1];
    std::vector<double> scores;
    for (std::int64_t e = 0; e < weight.shape[0]; ++e) {
      double score = has_bias ? bias.at(e) : 0;
      for (std::int64_t i = 0; i < size; ++i)
        score += hidden.at(token * size + i) * weight.at(e * size + i);
      if (is_corrected) score = 1 / (1 + std::exp(-score)) + correction.at(e);
      scores.push_back(score);
    }
    return scores;
  }

  std::mt19937 random;
  Tensor hidden, weight, bias, correction;
};

/// The places of the k largest, the largest first.
std::vector<std::int32_t> best(const std::vector<double>& scores, int k) {
  std::vector<std::int32_t> places(scores.size());
  std::iota(places.begin(), places.end(), 0);
  std::ranges::sort(places, [&](std::int32_t a, std::int32_t b) {
    return scores[static_cast<std::size_t>(a)] > scores[static_cast<std::size_t>(b)];
  });
  places.resize(static_cast<std::size_t>(k));
  return places;
}

}  // namespace

TEST_CASE("A guess names the experts with the best scores of each token", "[cuda][guess]") {
  if (!gpu_found()) return;
  const auto dtype = GENERATE(DataType::f32, DataType::f16, DataType::bf16);
  const auto is_weight_f32 = GENERATE(false, true);
  const auto has_bias = GENERATE(false, true);
  const auto is_corrected = GENERATE(false, true);
  const auto [tokens, experts, size, k] = GENERATE(table<int, int, int, int>({{1, 128, 2048, 8},
                                                                              {4, 8, 100, 2},
                                                                              {32, 512, 264, 16},
                                                                              {3, 60, 41, 4},
                                                                              {2, 1, 8, 1},
                                                                              {5, 6, 7, 6}}));
  const Asked asked(tokens, experts, size, dtype, is_weight_f32 ? DataType::f32 : dtype, 5);
  const OnDevice hidden(asked.hidden), weight(asked.weight), bias(asked.bias),
      correction(asked.correction);
  CudaBackend backend;
  PinnedBuffer pinned(backend, static_cast<std::size_t>(tokens * k) * sizeof(std::int32_t));
  auto* const ids = reinterpret_cast<std::int32_t*>(pinned.data());
  DeviceBuffer scratch;
  scratch.fill(std::vector<std::byte>(cuda::guess_bytes(experts)));
  cuda::RouterWeights router;
  router.weight = weight.view.data;
  router.weight_type = of_kernels(asked.weight.type);
  if (has_bias) router.bias = reinterpret_cast<const float*>(bias.view.data);
  if (is_corrected) router.correction = reinterpret_cast<const float*>(correction.view.data);
  router.experts = experts;
  router.top_k = k;
  for (int turn = 0; turn < 2; ++turn) {  // the scratch memory is as it was before
    std::fill_n(ids, tokens * k, -7);
    cuda::guess_choices(of_kernels(dtype), tokens, size, hidden.view.data, router, scratch.data(),
                        ids, nullptr);
    synchronize();
    for (int t = 0; t < tokens; ++t) {
      const std::vector<double> scores = asked.scores(t, has_bias, is_corrected);
      const std::vector<std::int32_t> expected = best(scores, k);
      for (int j = 0; j < k; ++j) {  // as good as the right one, ids aside: rounding may swap two
        const std::int32_t got = ids[t * k + j];
        REQUIRE((0 <= got && got < experts));
        const double wanted =
            scores[static_cast<std::size_t>(expected[static_cast<std::size_t>(j)])];
        CHECK(std::abs(scores[static_cast<std::size_t>(got)] - wanted) <= 1e-3);
        CHECK(std::count(ids + t * k, ids + (t + 1) * k, got) == 1);
      }
    }
  }
}

TEST_CASE("A guess leaves scores that are NaNs out, and refuses sizes that it has no room for",
          "[cuda][guess]") {
  if (!gpu_found()) return;
  Asked asked(1, 4, 16, DataType::f32, DataType::f32, 3);
  for (std::int64_t i = 0; i < 3 * 16; ++i) asked.weight.set(i, NAN);
  const OnDevice hidden(asked.hidden), weight(asked.weight);
  CudaBackend backend;
  PinnedBuffer pinned(backend, 64);
  auto* const ids = reinterpret_cast<std::int32_t*>(pinned.data());
  DeviceBuffer scratch;
  scratch.fill(std::vector<std::byte>(cuda::guess_bytes(4)));
  cuda::RouterWeights router;
  router.weight = weight.view.data;
  router.experts = 4;
  router.top_k = 2;
  const auto guess = [&](int tokens) {
    cuda::guess_choices(cuda::Dtype::f32, tokens, 16, hidden.view.data, router, scratch.data(), ids,
                        nullptr);
    synchronize();
  };
  guess(1);
  CHECK(ids[0] == 3);
  CHECK(ids[1] == -1);
  CHECK_THROWS_AS(guess(cuda::most_guessing_tokens + 1), std::invalid_argument);
  router.top_k = cuda::max_top_k + 1;
  CHECK_THROWS_AS(guess(1), std::invalid_argument);
}

TEST_CASE("A layer that guesses gives the same bits and brings what the next router chooses",
          "[cuda][guess][layer]") {
  if (!gpu_found()) return;
  const auto dtype = GENERATE(DataType::f32, DataType::bf16);
  const Model model(small_config(dtype));
  const auto experts = model.config.experts;
  OnGpu<LookAheadPolicy> all(model, all_pinned, Budget::fraction(1));
  const std::vector<std::byte> expected = all.pass();
  OnGpu<LookAheadPolicy> engine(model, all_pinned, Budget::experts(9));
  CHECK_THROWS_AS(engine.layers[0].forward_guessing({}, {}, {}, {}), StateError);
  CHECK_THROWS_AS(engine.layers[2].set_next_router({}), InvalidArgument);
  CHECK_THROWS_AS(engine.layers[0].set_next_router({}), InvalidArgument);
  std::vector<Asked> asked;
  std::deque<OnDevice> weights;
  for (std::size_t layer = 0; layer < 2; ++layer) {
    asked.emplace_back(1, experts, model.config.hidden_size, dtype, dtype,
                       static_cast<std::uint32_t>(layer) + 9);
    asked.back().hidden = model.inputs[layer].hidden;
    const OnDevice& weight = weights.emplace_back(asked.back().weight);
    engine.layers[layer].set_next_router({weight.view, {}, {}, model.config.top_k});
  }
  for (int turn = 0; turn < 4; ++turn) {
    engine.scheduler->begin_pass({}, 0, {});
    REQUIRE(outputs_of_pass(engine, [&](std::size_t layer) {
              const LayerInput& input = model.inputs[layer];
              const OnDevice hidden(input.hidden), ids(input.ids), scales(input.weights);
              return engine.output(
                  [&](const TensorView& out) {
                    if (layer < 2)
                      engine.layers[layer].forward_guessing(hidden.view, ids.view, scales.view,
                                                            out);
                    else
                      engine.layers[layer].forward(hidden.view, ids.view, scales.view, out);
                  },
                  layer);
            }) == expected);
  }
  const CacheStats stats = engine.scheduler->stats();
  for (std::size_t layer = 0; layer < 2; ++layer) {
    std::vector<bool> is_named(static_cast<std::size_t>(experts));
    for (std::int64_t t = 0; t < tokens; ++t)
      for (const std::int32_t id : best(asked[layer].scores(t, false, false), model.config.top_k))
        is_named[static_cast<std::size_t>(id)] = true;
    // One that is not there in time is left out: under a sanitizer, all of them.
    const std::int64_t foretold = stats.layers[layer + 1].look_ahead.foretold;
    CHECK(foretold % std::ranges::count(is_named, true) == 0);
    if (foretold == 0) WARN("no guess was there in time");
  }
}
