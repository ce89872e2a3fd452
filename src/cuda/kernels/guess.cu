// SPDX-License-Identifier: Apache-2.0
#include "guess.hpp"

#include <stdexcept>

#include "element.cuh"
#include "launch.cuh"
#include "splits.hpp"
#include "warp.cuh"

namespace sida::cuda {
namespace {

constexpr int guess_threads = 256, warps = guess_threads / 32;
constexpr int each = 8;  ///< elements that a lane takes at a time
constexpr int lane_experts = max_experts / 32;
constexpr std::size_t scores_offset = 16;

/// Elements i to i + 7 of a row that is aligned to 16 bytes.
template <class Element>
__device__ inline void load(float (&to)[each], const Element* row, int i) {
  constexpr int pieces = each * static_cast<int>(sizeof(Element)) / 16;
  constexpr int of_piece = each / pieces;
#pragma unroll
  for (int p = 0; p < pieces; ++p) {
    const uint4 piece = *reinterpret_cast<const uint4*>(row + i + p * of_piece);
    const Element* const values = reinterpret_cast<const Element*>(&piece);
#pragma unroll
    for (int j = 0; j < of_piece; ++j) to[p * of_piece + j] = to_float(values[j]);
  }
}

/// The product of two rows, by a warp; the same in every lane.
template <class Element, class Weight>
__device__ float product_of(const Element* x, const Weight* w, int size, bool is_aligned) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  float sum = 0.0f;
  if (is_aligned) {
    for (int i = lane * each; i < size; i += 32 * each) {
      float a[each], b[each];
      load(a, x, i);
      load(b, w, i);
#pragma unroll
      for (int j = 0; j < each; ++j) sum += a[j] * b[j];
    }
  } else {
    for (int i = lane; i < size; i += 32) sum += to_float(x[i]) * to_float(w[i]);
  }
  return warp_sum(sum);
}

/// The places of the best scores of a token, by a warp.
__device__ void choose(const float* scores, const RouterWeights& router, std::int32_t* chosen) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  float mine[lane_experts];
#pragma unroll
  for (int i = 0; i < lane_experts; ++i) {
    const int expert = i * 32 + lane;
    mine[i] = expert < router.experts ? __ldcg(scores + expert) : nanf("");
  }
  for (int j = 0; j < router.top_k; ++j) {
    float best = -INFINITY;
    int place = -1;
#pragma unroll
    for (int i = 0; i < lane_experts; ++i)
      if (mine[i] > best || (mine[i] == best && place < 0)) {
        best = mine[i];
        place = i * 32 + lane;
      }
#pragma unroll
    for (int offset = 16; offset >= 1; offset /= 2) {
      const float other = __shfl_xor_sync(whole_warp, best, offset);
      const int other_place = __shfl_xor_sync(whole_warp, place, offset);
      if (other_place >= 0 &&
          (place < 0 || other > best || (other == best && other_place < place))) {
        best = other;
        place = other_place;
      }
    }
#pragma unroll
    for (int i = 0; i < lane_experts; ++i)
      if (place == i * 32 + lane) mine[i] = nanf("");  // is chosen
    if (lane == 0) chosen[j] = place;
  }
}

/// A warp scores an expert for all tokens; the last block to end chooses.
template <class Element, class Weight>
__global__ void __launch_bounds__(guess_threads)
    guess_kernel(int tokens, int size, const Element* hidden, RouterWeights router, unsigned* ended,
                 float* scores, std::int32_t* host_ids) {
  __shared__ bool is_last;
  wait_for_previous();
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const bool is_aligned = size % each == 0;
  const int expert = static_cast<int>(blockIdx.x) * warps + warp;
  if (expert < router.experts) {
    const std::size_t row = static_cast<std::size_t>(expert) * static_cast<std::size_t>(size);
    const Weight* const weight = static_cast<const Weight*>(router.weight) + row;
    for (int t = 0; t < tokens; ++t) {
      const std::size_t token = static_cast<std::size_t>(t) * static_cast<std::size_t>(size);
      float score = product_of(hidden + token, weight, size, is_aligned);
      if (router.bias != nullptr) score += router.bias[expert];
      if (router.correction != nullptr)
        score = 1.0f / (1.0f + expf(-score)) + router.correction[expert];
      if (lane == 0) scores[t * router.experts + expert] = score;
    }
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(ended, 1u) == gridDim.x - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  if (threadIdx.x == 0) *ended = 0;
  for (int t = warp; t < tokens; t += warps)
    choose(scores + t * router.experts, router, host_ids + t * router.top_k);
}

}  // namespace

std::size_t guess_bytes(int experts) {
  return scores_offset + sizeof(float) * static_cast<std::size_t>(most_guessing_tokens) *
                             static_cast<std::size_t>(experts);
}

void guess_choices(Dtype dtype, int tokens, int hidden_size, const void* hidden,
                   const RouterWeights& router, std::byte* scratch, std::int32_t* host_ids,
                   Stream stream) {
  if (tokens < 1 || tokens > most_guessing_tokens || router.experts < 1 ||
      router.experts > max_experts || router.top_k < 1 || router.top_k > max_top_k)
    throw std::invalid_argument("guess kernel: tokens, experts or top_k out of range");
  const auto blocks = static_cast<unsigned>(parts_of(router.experts, warps));
  with_element(dtype, [&](auto element) {
    using Element = decltype(element);
    const auto go = [&](auto kernel) {
      launch("launch a guess of the next choices", kernel, dim3(blocks), guess_threads, stream,
             tokens, hidden_size, static_cast<const Element*>(hidden), router,
             reinterpret_cast<unsigned*>(scratch),
             reinterpret_cast<float*>(scratch + scores_offset), host_ids);
    };
    if (router.weight_type == Dtype::f32)
      go(guess_kernel<Element, float>);
    else
      go(guess_kernel<Element, Element>);
  });
}

}  // namespace sida::cuda
