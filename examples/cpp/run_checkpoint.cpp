// SPDX-License-Identifier: Apache-2.0
//
// Runs the MoE layers of a checkpoint without Python, with some of its experts in memory at a time:
//
//   run_checkpoint CHECKPOINT [BUDGET [TOKENS [BATCHES]]]
//   run_checkpoint models/wordnet-switch-32 20% 32 4
//
// Tokens and their routing are random, the same in every run. The routing of a batch is known when
// it begins, as from a perfect predictor, so experts are brought before their layer asks for them.

#include <cstdio>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "checkpoint_run.hpp"
#include "sida/io.hpp"
#include "sida/sida.hpp"

using Cache = sida::ExpertCache<sida::CpuBackend, sida::LookAheadPolicy>;
using Scheduler = sida::OffloadScheduler<sida::CpuBackend, sida::LookAheadPolicy>;
using Layer = sida::OffloadedExperts<sida::CpuBackend, sida::LookAheadPolicy>;

void run(const std::string& checkpoint, const std::string& budget, std::int64_t tokens,
         int batches) {
  const auto store = sida::CheckpointStore::open(checkpoint, {.dtype = sida::DataType::f32});
  const sida::MoeConfig& config = store->config();
  sida::CpuBackend backend;
  Cache cache(backend, store, sida::Budget::parse(budget));
  const auto scheduler = std::make_shared<Scheduler>(backend, cache);
  const auto ffn = std::make_shared<sida::ExpertFfn<sida::CpuBackend>>(config, /*threads=*/2);
  std::printf("%d layers of %d experts, %zu bytes each; %lld of %lld are resident at most\n",
              config.layers, config.experts, cache.slot_bytes(),
              static_cast<long long>(cache.slots()), static_cast<long long>(cache.total_experts()));

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
      sum += add_to(hidden, out);
    }
    scheduler->end_pass();
  }
  print(sum, scheduler->stats());
}

int main(int argc, char** argv) { return run_with_arguments("run_checkpoint", argc, argv, run); }
