// SPDX-License-Identifier: Apache-2.0
// The time of one expert layer on a GPU, in a CUDA graph, with weights that are not in L2: a graph
// holds 16 calls, each with its own routing. Prints one JSON row for each shape and token count.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <numeric>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "expert_kernels.hpp"
#include "sida/core/half.hpp"
#include "sida/ffn/slab_layout.hpp"

namespace {

using namespace sida;

// Measured on one H200: what design and documents call the floor of a layer.
constexpr double bytes_per_us = 4.49e6, flops_per_us = 784e6;
constexpr int calls = 16, warmups = 10, repetitions = 60;

void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

struct Shape {
  const char* name;
  int hidden, intermediate, experts, top_k;
  bool gated;
};

/// Device memory, freed at its end.
struct Buffer {
  std::byte* data = nullptr;
  explicit Buffer(std::size_t bytes) { check(cudaMalloc(reinterpret_cast<void**>(&data), bytes)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { cudaFree(data); }
};

/// Fills device memory with bf16 numbers of standard deviation `deviation`.
void fill_random(std::byte* data, std::size_t bytes, double deviation, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, static_cast<float>(deviation));
  std::vector<BFloat16> block(std::min<std::size_t>(bytes / 2, 1 << 21));
  for (BFloat16& value : block) value = to_bf16(normal(random));
  for (std::size_t at = 0; at < bytes; at += block.size() * 2)
    check(cudaMemcpy(data + at, block.data(), std::min(block.size() * 2, bytes - at),
                     cudaMemcpyHostToDevice));
}

/// Distinct experts for each token, uniform; neighbouring calls of few tokens share none.
std::vector<std::int32_t> routing(const Shape& shape, int tokens, int call, std::mt19937& random) {
  std::vector<std::int32_t> ids, order(static_cast<std::size_t>(shape.experts));
  std::iota(order.begin(), order.end(), 0);
  for (int t = 0; t < tokens; ++t) {
    if (tokens > 1) std::shuffle(order.begin(), order.end(), random);
    for (int j = 0; j < shape.top_k; ++j) {
      const int at = tokens > 1 ? j : (call * shape.top_k + j) % shape.experts;
      ids.push_back(order[static_cast<std::size_t>(at)]);
    }
  }
  return ids;
}

void measure(const Shape& shape, int tokens) {
  MoeConfig config;
  config.layers = 1;
  config.experts = shape.experts;
  config.hidden_size = shape.hidden;
  config.intermediate_size = shape.intermediate;
  config.top_k = shape.top_k;
  config.gated = shape.gated;
  config.dtype = DataType::bf16;
  const SlabLayout layout(config);
  cuda::LayerShape layer;
  layer.dtype = cuda::Dtype::bf16;
  layer.tokens = tokens;
  layer.top_k = shape.top_k;
  layer.experts = shape.experts;
  layer.hidden = shape.hidden;
  layer.intermediate = shape.intermediate;
  layer.activation = shape.gated ? cuda::Act::silu : cuda::Act::relu;
  layer.gated = shape.gated;

  const auto experts = static_cast<std::size_t>(shape.experts);
  const auto assignments = static_cast<std::size_t>(tokens) * static_cast<std::size_t>(shape.top_k);
  const std::size_t hidden_bytes =
      static_cast<std::size_t>(tokens) * static_cast<std::size_t>(shape.hidden) * 2;
  Buffer arena(layout.slab_bytes * experts), hidden(hidden_bytes);
  fill_random(arena.data, layout.slab_bytes * experts, 0.02, 1);
  fill_random(hidden.data, hidden_bytes, 1.0, 2);
  Buffer out(hidden_bytes), plan_memory(cuda::plan_bytes(layer)),
      workspace(cuda::workspace_bytes(layer)), slots(experts * 4), weights(assignments * 4),
      ids(assignments * 4 * calls);
  std::mt19937 random(3);
  std::vector<std::int32_t> slot_of(experts);
  std::iota(slot_of.begin(), slot_of.end(), 0);
  std::shuffle(slot_of.begin(), slot_of.end(), random);
  check(cudaMemcpy(slots.data, slot_of.data(), experts * 4, cudaMemcpyHostToDevice));
  const std::vector<float> scales(assignments, 1.0f / static_cast<float>(shape.top_k));
  check(cudaMemcpy(weights.data, scales.data(), assignments * 4, cudaMemcpyHostToDevice));
  double active = 0;
  for (int call = 0; call < calls; ++call) {
    const auto chosen = routing(shape, tokens, call, random);
    active += static_cast<double>(std::set<std::int32_t>(chosen.begin(), chosen.end()).size());
    check(cudaMemcpy(ids.data + static_cast<std::size_t>(call) * assignments * 4, chosen.data(),
                     assignments * 4, cudaMemcpyHostToDevice));
  }

  const cuda::Plan plan = cuda::plan_at(layer, plan_memory.data);
  const cuda::ExpertSlabs slabs{arena.data,
                                layout.slab_bytes,
                                reinterpret_cast<const std::int32_t*>(slots.data),
                                layout.up_offset,
                                layout.down_offset,
                                layout.up_bias_offset,
                                layout.down_bias_offset};
  const auto* scale = reinterpret_cast<const float*>(weights.data);
  cudaStream_t stream = nullptr;
  check(cudaStreamCreate(&stream));
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int call = 0; call < calls; ++call) {
    cuda::make_plan(layer, ids.data + static_cast<std::size_t>(call) * assignments * 4, false,
                    scale, plan, stream);
    cuda::compute_experts(layer, plan, hidden.data, slabs, workspace.data, stream);
    cuda::combine(layer, plan, scale, workspace.data, out.data, stream);
  }
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t replay = nullptr;
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&replay, graph, 0));
  cudaEvent_t begin = nullptr, end = nullptr;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  std::vector<double> times;
  for (int i = 0; i < warmups + repetitions; ++i) {
    check(cudaEventRecord(begin, stream));
    check(cudaGraphLaunch(replay, stream));
    check(cudaEventRecord(end, stream));
    check(cudaEventSynchronize(end));
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, begin, end));
    if (i >= warmups) times.push_back(1000.0 * static_cast<double>(milliseconds) / calls);
  }
  std::sort(times.begin(), times.end());
  const double matrices = shape.gated ? 3 : 2;
  const double parameters = matrices * shape.hidden * shape.intermediate;
  const double bytes = active / calls * parameters * 2;
  const double floor = std::max(bytes / bytes_per_us,
                                2 * parameters * static_cast<double>(assignments) / flops_per_us);
  const double median = times[times.size() / 2];
  std::printf(
      "{\"shape\": \"%s\", \"tokens\": %d, \"median_us\": %.2f, \"min_us\": %.2f, \"p10_us\": "
      "%.2f, "
      "\"p90_us\": %.2f, \"floor_us\": %.2f, \"share_of_floor\": %.3f, \"active_experts\": %.1f}\n",
      shape.name, tokens, median, times.front(), times[times.size() / 10],
      times[times.size() * 9 / 10], floor, floor / median, active / calls);
  std::fflush(stdout);
  check(cudaEventDestroy(begin));
  check(cudaEventDestroy(end));
  check(cudaGraphExecDestroy(replay));
  check(cudaGraphDestroy(graph));
  check(cudaStreamDestroy(stream));
}

}  // namespace

int main() {
  try {
    for (const Shape& shape :
         {Shape{"switch-128", 768, 3072, 128, 1, false},
          Shape{"qwen3-30b", 2048, 768, 128, 8, true}, Shape{"mixtral", 4096, 14336, 8, 2, true}})
      for (const int tokens : {1, 64}) measure(shape, tokens);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "cuda_expert_layer: %s\n", error.what());
    return 1;
  }
  return 0;
}
