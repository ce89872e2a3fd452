// SPDX-License-Identifier: Apache-2.0
#include "launch.cuh"
#include "predictor_kernels.hpp"
#include "warp.cuh"

namespace sida::cuda {
namespace {

constexpr int threads = 256;

/// An expert and its probability.
struct Candidate {
  float prob;
  int id;

  /// By falling probability, lower ids first among equals.
  __device__ bool is_before(const Candidate& other) const {
    return prob > other.prob || (prob == other.prob && id < other.id);
  }
};

/// Turns logits into probabilities, in place. @returns whether they are all finite.
__device__ bool softmax(float* logits, int count, int lane) {
  float largest = -INFINITY, sum = 0.0f;
  for (int e = lane; e < count; e += 32) largest = fmaxf(largest, logits[e]);
  largest = warp_max(largest);
  for (int e = lane; e < count; e += 32) sum += logits[e] = expf(logits[e] - largest);
  sum = warp_sum(sum);
  for (int e = lane; e < count; e += 32) logits[e] /= sum;
  __syncwarp();
  return isfinite(sum);
}

/// The first of the candidates that come behind `last`.
__device__ Candidate next_candidate(const float* probs, int count, const Candidate& last,
                                    int lane) {
  Candidate best{-1.0f, count};
  for (int e = lane; e < count; e += 32) {
    const Candidate found{probs[e], e};
    if (last.is_before(found) && found.is_before(best)) best = found;
  }
#pragma unroll
  for (int offset = 16; offset >= 1; offset /= 2) {
    const Candidate other{__shfl_xor_sync(whole_warp, best.prob, offset),
                          __shfl_xor_sync(whole_warp, best.id, offset)};
    if (other.is_before(best)) best = other;
  }
  return best;
}

/// A warp a row and head.
__global__ void __launch_bounds__(threads)
    choose_kernel(float* logits, const float* hidden, PredictorLinear scale, int rows, int heads,
                  int experts, int candidates, float scale_factor, Choices choices) {
  wait_for_previous();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::size_t warp = blockIdx.x * static_cast<std::size_t>(threads / 32) + threadIdx.x / 32;
  const int row = static_cast<int>(warp / heads), head = static_cast<int>(warp % heads);
  if (row >= rows) return;
  float* const probs = logits + warp * experts;
  const float* const state = hidden + static_cast<std::size_t>(row) * scale.in;
  const std::size_t at = (static_cast<std::size_t>(head) * rows + row) * candidates;
  if (!softmax(probs, experts, lane)) {
    // As the model itself would, NaN embeddings give NaN outputs; nothing is fetched for them.
    for (int c = lane; c < candidates; c += 32) {
      choices.ids[at + c] = c;
      choices.probs[at + c] = 0.0f;
      choices.scale[at + c] = NAN;
    }
    return;
  }
  Candidate candidate{INFINITY, -1};
  for (int c = 0; c < candidates; ++c) {
    candidate = next_candidate(probs, experts, candidate, lane);
    const std::size_t out = static_cast<std::size_t>(head) * experts + candidate.id;
    float logit = 0.0f;
    for (int k = lane; k < scale.in; k += 32)
      logit = fmaf(scale.weight[out * scale.in + k], state[k], logit);
    logit = warp_sum(logit) + scale.bias[out];
    if (lane != 0) continue;
    choices.ids[at + c] = candidate.id;
    choices.probs[at + c] = candidate.prob;
    choices.scale[at + c] = scale_factor / (1.0f + expf(-logit));
  }
}

}  // namespace

void choose_experts(float* logits, const float* hidden, const PredictorLinear& scale, int rows,
                    int heads, int experts, int candidates, float scale_factor,
                    const Choices& choices, CUstream_st* stream) {
  if (rows == 0) return;
  constexpr std::size_t warps = threads / 32;
  const std::size_t pairs = static_cast<std::size_t>(rows) * static_cast<std::size_t>(heads);
  launch("launch the predictor's heads", choose_kernel,
         dim3(static_cast<unsigned>((pairs + warps - 1) / warps)), threads, stream, logits, hidden,
         scale, rows, heads, experts, candidates, scale_factor, choices);
}

}  // namespace sida::cuda
