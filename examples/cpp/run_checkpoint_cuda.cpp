// SPDX-License-Identifier: Apache-2.0
//
// As run_checkpoint, on a GPU: experts lie in pinned memory, the budget's share of them on the GPU.
//
//   run_checkpoint_cuda CHECKPOINT [BUDGET [TOKENS [BATCHES]]]
//
// Link sida::cuda; CUDA's headers are not needed.

#include <cstdio>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "checkpoint_run.hpp"
#include "sida/cuda.hpp"
#include "sida/io.hpp"
#include "sida/sida.hpp"

using Gpu = sida::CudaBackend;
using Cache = sida::ExpertCache<Gpu, sida::LookAheadPolicy>;
using Scheduler = sida::OffloadScheduler<Gpu, sida::LookAheadPolicy>;
using Layer = sida::OffloadedExperts<Gpu, sida::LookAheadPolicy>;

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
  std::printf("%d layers of %d experts, %zu bytes each; %lld of %lld are resident at most\n",
              config.layers, config.experts, cache.slot_bytes(),
              static_cast<long long>(cache.slots()), static_cast<long long>(cache.total_experts()));

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
      sum += add_to(hidden, out);
    }
    scheduler->end_pass();
  }
  print(sum, scheduler->stats());
}

int main(int argc, char** argv) {
  return run_with_arguments("run_checkpoint_cuda", argc, argv, run);
}
