// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "launch.cuh"
#include "predictor_kernels.hpp"
#include "warp.cuh"

namespace sida::cuda {
namespace {

constexpr int threads = 256;
constexpr int warps = threads / 32;
constexpr int most = AttentionTile::most;
static_assert(most == warps);  // a warp a query

/// A block's scratch memory: of each query the scores, and which keys are left of them.
struct Scores {
  float* values;
  std::int32_t* keys;
};

/// Makes of scores z the weights exp(z - max z), in place. @returns their sum.
__device__ float exponentials(float* scores, int count, int lane) {
  float largest = -INFINITY, sum = 0.0f;
  for (int j = lane; j < count; j += 32) largest = fmaxf(largest, scores[j]);
  largest = warp_max(largest);
  for (int j = lane; j < count; j += 32) sum += scores[j] = expf(scores[j] - largest);
  return warp_sum(sum);
}

/// Projects scores onto the simplex (sparsemax; the threshold as in Michelot 1986: elements below
/// it are dropped until none is), and packs what is not zero. @returns how many are left. A row
/// with an element that is not finite becomes NaN throughout.
__device__ int packed_sparsemax(const Scores& scores, int count, int lane) {
  float largest = -INFINITY;
  bool finite = true;
  for (int j = lane; j < count; j += 32) {
    const float z = scores.values[j];
    finite = finite && isfinite(z);
    largest = fmaxf(largest, z);
  }
  largest = warp_max(largest);
  finite = __all_sync(whole_warp, finite);
  double threshold = -1.0;  // it lies less than 1 below the largest element
  for (int before = -1; finite;) {
    double sum = 0.0;
    int left = 0;
    for (int j = lane; j < count; j += 32) {
      const float z = scores.values[j] - largest;
      if (static_cast<double>(z) <= threshold) continue;
      sum += z;
      ++left;
    }
    sum = warp_sum(sum);
    left = warp_sum(left);
    if (left == before) break;
    before = left;
    threshold = (sum - 1.0) / left;
  }
  int packed = 0;
  for (int begin = 0; begin < count; begin += 32) {
    const int j = begin + lane;
    float weight = 0.0f;
    if (j < count) {
      weight = NAN;
      if (finite)
        weight = fmaxf(
            0.0f, static_cast<float>(static_cast<double>(scores.values[j] - largest) - threshold));
    }
    const bool kept = j < count && weight != 0.0f;
    const unsigned mask = __ballot_sync(whole_warp, kept);
    __syncwarp();  // what is written over was read
    if (kept) {
      const int at = packed + __popc(mask & ((1u << lane) - 1));
      scores.values[at] = weight;
      scores.keys[at] = j;
    }
    packed += __popc(mask);
  }
  __syncwarp();
  return packed;
}

/// Blocks take tiles in turn: up to eight queries of one sentence and one head.
template <bool Sparse>
__global__ void __launch_bounds__(threads) attention_kernel(AttentionCall call) {
  wait_for_previous();
  extern __shared__ float queries[];  // [most, size]
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const std::size_t pitch = static_cast<std::size_t>(call.longest);
  float* const values = static_cast<float*>(call.scratch) + blockIdx.x * 2 * most * pitch;
  auto* const keys = reinterpret_cast<std::int32_t*>(values + most * pitch);
  const float scale = Sparse ? 1.0f : 1.0f / sqrtf(static_cast<float>(call.size));
  const int width = call.heads * call.size;
  for (int i = static_cast<int>(blockIdx.x); i < call.tile_count * call.heads;
       i += static_cast<int>(gridDim.x)) {
    const AttentionTile tile = call.tiles[i / call.heads];
    const int column = i % call.heads * call.size;
    const int seen = tile.keys + (call.earlier ? call.earlier[tile.sentence] : 0);
    const auto visible = [&](int query) {
      return call.is_causal ? seen - tile.rows + 1 + query : seen;
    };
    for (int k = static_cast<int>(threadIdx.x); k < most * call.size; k += threads) {
      const int query = k / call.size;
      queries[k] = query < tile.rows
                       ? call.query[static_cast<std::size_t>(tile.row + query) * call.query_stride +
                                    column + k % call.size]
                       : 0.0f;
    }
    __syncthreads();
    for (int j = warp; j < seen; j += warps) {
      const float* const key =
          call.key + (static_cast<std::size_t>(tile.key) + j) * call.key_stride + column;
      float sums[most] = {};
      for (int k = lane; k < call.size; k += 32) {
        const float element = key[k];
#pragma unroll
        for (int query = 0; query < most; ++query)
          sums[query] = fmaf(queries[query * call.size + k], element, sums[query]);
      }
      const float score = sum_each<most>(sums, lane) * scale;
      constexpr int copies = 32 / most;
      if (lane % copies == 0) values[lane / copies * pitch + j] = score;
    }
    __syncthreads();
    if (warp < tile.rows) {
      const Scores scores{values + warp * pitch, keys + warp * pitch};
      float* const out = call.out + static_cast<std::size_t>(tile.row + warp) * width + column;
      const float* const value =
          call.value + static_cast<std::size_t>(tile.key) * call.key_stride + column;
      if constexpr (Sparse) {
        const int packed = packed_sparsemax(scores, visible(warp), lane);
        for (int k = lane; k < call.size; k += 32) {
          float sum = out[k];
          for (int j = 0; j < packed; ++j)
            sum = fmaf(scores.values[j],
                       value[static_cast<std::size_t>(scores.keys[j]) * call.key_stride + k], sum);
          out[k] = sum;
        }
      } else {
        const int count = visible(warp);
        const float total = exponentials(scores.values, count, lane);
        __syncwarp();
        for (int k = lane; k < call.size; k += 32) {
          float sum = 0.0f;
#pragma unroll 4
          for (int j = 0; j < count; ++j)
            sum = fmaf(scores.values[j], value[static_cast<std::size_t>(j) * call.key_stride + k],
                       sum);
          out[k] = sum / total;
        }
      }
    }
    __syncthreads();  // queries and scores were read
  }
}

std::size_t block_scratch(int longest) {
  return static_cast<std::size_t>(longest) * 2 * most * sizeof(float);
}

int blocks_for(int tiles, int heads, int longest) {
  const std::size_t room = std::max<std::size_t>(attention_limit / block_scratch(longest), 1);
  const std::size_t wanted = static_cast<std::size_t>(tiles) * static_cast<std::size_t>(heads);
  return static_cast<int>(std::min<std::size_t>({room, wanted, 1024}));
}

template <bool Sparse>
void launch_attention(const AttentionCall& call, CUstream_st* stream) {
  constexpr const char* what = "launch the predictor's attention";
  if (call.tile_count == 0) return;
  const std::size_t shared = sizeof(float) * most * static_cast<std::size_t>(call.size);
  check(cudaFuncSetAttribute(attention_kernel<Sparse>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             shared_memory_room()),
        what);
  const int blocks = blocks_for(call.tile_count, call.heads, call.longest);
  launch_shared(what, attention_kernel<Sparse>, dim3(static_cast<unsigned>(blocks)), threads,
                shared, stream, call);
}

}  // namespace

std::size_t attention_scratch(int tiles, int heads, int longest) {
  if (tiles == 0) return 0;
  return static_cast<std::size_t>(blocks_for(tiles, heads, longest)) * block_scratch(longest);
}

void attend(const AttentionCall& call, CUstream_st* stream) {
  launch_attention<false>(call, stream);
}
void attend_sparsely(const AttentionCall& call, CUstream_st* stream) {
  launch_attention<true>(call, stream);
}

}  // namespace sida::cuda
