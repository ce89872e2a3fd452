// SPDX-License-Identifier: Apache-2.0
//
// Runs the MoE layers of a checkpoint without Python, with some of its experts in memory at a time:
//
//   run_checkpoint CHECKPOINT [BUDGET [TOKENS [BATCHES]]]
//   run_checkpoint models/wordnet-switch-32 20% 32 4
//
// Tokens and their routing are random, the same in every run. The routing of a batch is known when
// it begins, as from a perfect predictor, so experts are brought before their layer asks for them.

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <exception>
#include <iomanip>
#include <iostream>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "sida/io.hpp"
#include "sida/sida.hpp"

using Cache = sida::ExpertCache<sida::CpuBackend, sida::LookAheadPolicy>;
using Scheduler = sida::OffloadScheduler<sida::CpuBackend, sida::LookAheadPolicy>;
using Layer = sida::OffloadedExperts<sida::CpuBackend, sida::LookAheadPolicy>;

// For every layer and token its top_k experts, all different, with equal weights.
sida::HashTable random_routing(const sida::MoeConfig& config, std::int64_t tokens,
                               std::mt19937& random) {
  sida::HashTable table{config.layers, config.top_k, {0}, {0, tokens}, {}, {}, {}};
  for (std::int64_t row = 0; row < config.layers * tokens; ++row) {
    const auto first = static_cast<std::int32_t>(random() % static_cast<unsigned>(config.experts));
    for (std::int32_t j = 0; j < config.top_k; ++j)
      table.ids.push_back((first + j) % config.experts);
  }
  table.probs.assign(table.ids.size(), 1.0f);
  table.scale.assign(table.ids.size(), 1.0f / static_cast<float>(config.top_k));
  return table;
}

void run(const std::string& checkpoint, const std::string& budget, std::int64_t tokens,
         int batches) {
  const auto store = sida::CheckpointStore::open(checkpoint, {.dtype = sida::DataType::f32});
  const sida::MoeConfig& config = store->config();
  sida::CpuBackend backend;
  Cache cache(backend, store, sida::Budget::parse(budget));
  const auto scheduler = std::make_shared<Scheduler>(backend, cache);
  const auto ffn = std::make_shared<sida::ExpertFfn<sida::CpuBackend>>(config, /*threads=*/2);
  std::cout << config.layers << " layers of " << config.experts << " experts, "
            << cache.slot_bytes() << " bytes each; " << cache.slots() << " of "
            << cache.total_experts() << " are resident at most\n";

  std::mt19937 random(0);
  std::vector<float> hidden(static_cast<std::size_t>(tokens * config.hidden_size)), out(hidden);
  const std::vector<std::int64_t> shape{tokens, config.hidden_size};
  double sum = 0;
  for (int batch = 0; batch < batches; ++batch) {
    for (float& x : hidden) x = static_cast<float>(random() % 2001) / 1000.0f - 1.0f;
    scheduler->begin_pass(random_routing(config, tokens, random), 0, {});
    for (std::int32_t layer = 0; layer < config.layers; ++layer) {
      Layer(config, layer, scheduler, ffn)
          .forward_predicted({std::as_bytes(std::span(hidden)).data(), config.dtype, shape},
                             {std::as_writable_bytes(std::span(out)).data(), config.dtype, shape});
      for (std::size_t i = 0; i < out.size(); ++i) {  // the block's residual
        sum += std::abs(out[i]);
        hidden[i] = std::clamp(hidden[i] + out[i], -4.0f, 4.0f);
      }
    }
    scheduler->end_pass();
  }
  const sida::CacheStats stats = scheduler->stats();
  std::cout << "sum of |output|: " << std::setprecision(17) << sum << "\nuses " << stats.total.uses
            << " = hits " << stats.total.hits << " + late " << stats.total.late << " + misses "
            << stats.total.misses << "; " << stats.loads << " loads, " << stats.bytes_moved
            << " bytes moved\n";
}

int main(int argc, char** argv) try {
  const std::int64_t tokens = argc > 3 ? std::atoll(argv[3]) : 32;
  const int batches = argc > 4 ? std::atoi(argv[4]) : 4;
  if (argc < 2 || argc > 5 || tokens < 1 || batches < 1) {
    std::cerr << "usage: run_checkpoint CHECKPOINT [BUDGET [TOKENS [BATCHES]]]\n";
    return 2;
  }
  run(argv[1], argc > 2 ? argv[2] : "20%", tokens, batches);
} catch (const std::exception& error) {
  std::cerr << "run_checkpoint: " << error.what() << '\n';
  return 1;
}
