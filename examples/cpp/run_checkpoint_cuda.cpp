// SPDX-License-Identifier: Apache-2.0
//
// As run_checkpoint, on a GPU: experts lie in pinned memory, the budget's share of them on the GPU.
//
//   run_checkpoint_cuda CHECKPOINT [BUDGET [TOKENS [BATCHES]]]
//
// Link sida::cuda; CUDA's headers are not needed.

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

#include "sida/cuda.hpp"
#include "sida/io.hpp"
#include "sida/sida.hpp"

using Gpu = sida::CudaBackend;
using Cache = sida::ExpertCache<Gpu, sida::LookAheadPolicy>;
using Scheduler = sida::OffloadScheduler<Gpu, sida::LookAheadPolicy>;
using Layer = sida::OffloadedExperts<Gpu, sida::LookAheadPolicy>;

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
  Gpu gpu;
  const auto file = sida::CheckpointStore::open(checkpoint, {.dtype = sida::DataType::f32});
  const sida::MoeConfig& config = file->config();
  const std::size_t all_bytes =
      file->slab_bytes() * static_cast<std::size_t>(config.total_experts());
  Cache cache(gpu, std::make_shared<sida::PinnedStore>(gpu, file, all_bytes),
              sida::Budget::parse(budget));
  const auto scheduler = std::make_shared<Scheduler>(gpu, cache);
  const auto ffn = std::make_shared<sida::ExpertFfn<Gpu>>(gpu, config);
  std::cout << config.layers << " layers of " << config.experts << " experts, "
            << cache.slot_bytes() << " bytes each; " << cache.slots() << " of "
            << cache.total_experts() << " are resident at most\n";

  std::mt19937 random(0);
  std::vector<float> hidden(static_cast<std::size_t>(tokens * config.hidden_size)), out(hidden);
  const std::size_t bytes = std::span(hidden).size_bytes();
  const std::vector<std::int64_t> shape{tokens, config.hidden_size};
  const sida::Buffer<Gpu> hidden_there(gpu, bytes), out_there(gpu, bytes);
  Gpu::Stream stream = gpu.make_stream();
  Gpu::Event done = gpu.make_event();
  ffn->set_stream(stream.native());  // layers, and copies around them, one after the other
  double sum = 0;
  for (int batch = 0; batch < batches; ++batch) {
    for (float& x : hidden) x = static_cast<float>(random() % 2001) / 1000.0f - 1.0f;
    scheduler->begin_pass(random_routing(config, tokens, random), 0, {});
    for (std::int32_t layer = 0; layer < config.layers; ++layer) {
      gpu.copy_async(hidden_there.data(), hidden.data(), bytes, stream);
      Layer(config, layer, scheduler, ffn)
          .forward_predicted({hidden_there.data(), config.dtype, shape},
                             {out_there.data(), config.dtype, shape});
      gpu.copy_async(out.data(), out_there.data(), bytes, stream);
      gpu.record(done, stream);
      gpu.synchronize(done);
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
    std::cerr << "usage: run_checkpoint_cuda CHECKPOINT [BUDGET [TOKENS [BATCHES]]]\n";
    return 2;
  }
  run(argv[1], argc > 2 ? argv[2] : "20%", tokens, batches);
} catch (const std::exception& error) {
  std::cerr << "run_checkpoint_cuda: " << error.what() << '\n';
  return 1;
}
