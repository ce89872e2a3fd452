// SPDX-License-Identifier: Apache-2.0
#pragma once

// What run_checkpoint and run_checkpoint_cuda share.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <random>
#include <string>
#include <vector>

#include "sida/sida.hpp"

// For every layer and token its top_k experts, all different, with equal weights.
inline sida::HashTable random_routing(const sida::MoeConfig& config, std::int64_t tokens,
                                      std::mt19937& random) {
  sida::HashTable table;
  table.layers = config.layers;
  table.candidates = config.top_k;
  table.keys = {0};
  table.offsets = {0, tokens};
  for (std::int64_t row = 0; row < config.layers * tokens; ++row) {
    const auto first = static_cast<std::int32_t>(random() % static_cast<unsigned>(config.experts));
    for (std::int32_t j = 0; j < config.top_k; ++j)
      table.ids.push_back((first + j) % config.experts);
  }
  table.probs.assign(table.ids.size(), 1.0f);
  table.scale.assign(table.ids.size(), 1.0f / static_cast<float>(config.top_k));
  return table;
}

// The block's residual; returns the sum of |out|.
inline double add_to(std::vector<float>& hidden, const std::vector<float>& out) {
  double sum = 0;
  for (const float x : out) sum += std::abs(x);
  for (std::size_t i = 0; i < hidden.size(); ++i)
    hidden[i] = std::clamp(hidden[i] + out[i], -4.0f, 4.0f);
  return sum;
}

inline void print(double sum, const sida::CacheStats& stats) {
  std::printf("sum of |output|: %.17g\n", sum);
  std::printf("uses %lld = hits %lld + late %lld + misses %lld; %lld loads, %lld bytes moved\n",
              static_cast<long long>(stats.total.uses), static_cast<long long>(stats.total.hits),
              static_cast<long long>(stats.total.late), static_cast<long long>(stats.total.misses),
              static_cast<long long>(stats.loads), static_cast<long long>(stats.bytes_moved));
}

// Reads the arguments, and calls run(checkpoint, budget, tokens, batches).
template <class Run>
int run_with_arguments(const char* name, int argc, char** argv, Run&& run) try {
  const std::int64_t tokens = argc > 3 ? std::atoll(argv[3]) : 32;
  const int batches = argc > 4 ? std::atoi(argv[4]) : 4;
  if (argc < 2 || argc > 5 || tokens < 1 || batches < 1) {
    std::fprintf(stderr, "usage: %s CHECKPOINT [BUDGET [TOKENS [BATCHES]]]\n", name);
    return 2;
  }
  run(argv[1], argc > 2 ? argv[2] : "20%", tokens, batches);
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s: %s\n", name, error.what());
  return 1;
}
