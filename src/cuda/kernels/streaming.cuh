// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "launch.cuh"
#include "multiply.cuh"
#include "product.cuh"

namespace sida::cuda {

constexpr int streaming_threads = block_warps * 32;
/// Outputs of a stripe of 16 weight rows.
template <Phase phase>
constexpr int stripe_outputs = phase == Phase::gated_up ? 8 : 16;

/// 16 bytes of weights, read once: past L1, which inputs need more.
__device__ inline uint4 load_weights(const void* address) {
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address));
  return value;
}

/// 16 bytes that the kernel before may have written.
__device__ inline uint4 load_input(const void* address) {
  uint4 value;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address)
               : "memory");
  return value;
}

/// A block's part of a product: which of the active experts, which of the blocks of outputs that
/// lie side by side, and which split of the contracted dimension.
struct StreamedPart {
  int expert, outputs, split;
};

/// A block computes `stripes` x 16 weight rows of one expert for `tiles` x 8 of its rows at a time;
/// its warps, and with splits other blocks, share the contracted dimension, and their sums are
/// added in order.
///
/// Weights go from memory straight into the registers of mma's A operand. A lane's 16 bytes are 8
/// neighbours in k where mma expects 2 + 2 from two places; as weights and tokens are permuted
/// alike, the products are the same. With a gate, rows 0 to 7 of a stripe are the gate's and rows 8
/// to 15 those beside it, so that both meet in one block. Rows and tokens past the end repeat
/// the last one, and what they give is not stored.
template <class Element, Phase phase, int stripes, int tiles>
__device__ __forceinline__ void stream_product(const Product& product, const StreamedPart& part,
                                               const FewSlots& few) {
  using Task = ExpertProduct<Element, phase>;
  constexpr int batch = stripes == 1 ? 4 : 2;  // steps whose loads are under way together
  constexpr int each = stripe_outputs<phase>;
  __shared__ float partial[block_warps][stripes * tiles * 128];

  // What the plan says has been written before the previous kernel let this one start, so a down
  // product may fetch weights while the up product still runs.
  if constexpr (!Task::down) wait_for_previous();
  const ActiveExpert expert = product.plan.active[part.expert];
  const bool active = part.expert < *product.plan.active_count;
  int slot = -1;
  if (active)
    slot = product.slabs.slot_of != nullptr ? product.slabs.slot_of[expert.expert]
                                            : few.of[part.expert];
  const int splits = Task::down && active ? down_splits(product.shape, expert.rows) : 1;
  const int split = part.split;
  const bool idle = slot < 0 || split >= splits;
  if (idle) {
    if constexpr (Task::down) wait_for_previous();
    return;
  }
  const Task task{product, product.slabs.arena + slot * product.slabs.stride, expert};
  const int outputs = task.outputs(), depth = task.depth();
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  const int group = thread % 32 / 4, quarter = thread % 4;
  const int first_output = part.outputs * stripes * each;

  const Element* rows[stripes][2];
  for (int s = 0; s < stripes; ++s) {
    const int row = first_output + s * each + group;
    const int last = outputs - 1;
    rows[s][0] = task.weights(min(row, last));
    rows[s][1] = task.weights(Task::gated ? outputs + min(row, last) : min(row + 8, last));
  }
  const int steps = (depth + k_step - 1) / k_step, shares = splits * block_warps;
  const int share = split * block_warps + warp;
  const int begin = steps * share / shares, end = steps * (share + 1) / shares;

  if constexpr (Task::down) {
    const int ahead = min((begin + 2 * quarter) * k_step, depth - 1);
    if (begin + 2 * quarter < end)
      for (int s = 0; s < stripes; ++s)
        for (int half = 0; half < 2; ++half)
          asm volatile("prefetch.global.L2 [%0];" ::"l"(rows[s][half] + ahead));
    wait_for_previous();
  }
  let_next_start();

  for (int first = 0; first < expert.rows; first += tiles * 8) {
    const int used = min((expert.rows - first + 7) / 8, tiles);
    const Element* inputs[tiles];
    for (int n = 0; n < tiles; ++n)
      inputs[n] = task.input(min(first + n * 8 + group, expert.rows - 1));
    float sums[stripes][tiles][4] = {};
    for (int step = begin; step < end; step += batch) {
      uint4 a[batch][stripes][2];
#pragma unroll
      for (int b = 0; b < batch; ++b) {
        const int k = (step + b) * k_step + quarter * 8;
        const bool inside = step + b < end && k < depth;
#pragma unroll
        for (int s = 0; s < stripes; ++s)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            a[b][s][half] = inside ? load_weights(rows[s][half] + k) : uint4{};
      }
#pragma unroll
      for (int n = 0; n < tiles; ++n) {
        if (n >= used) break;
        uint4 x[batch];
#pragma unroll
        for (int b = 0; b < batch; ++b) {
          const int k = (step + b) * k_step + quarter * 8;
          x[b] = step + b < end && k < depth ? load_input(inputs[n] + k) : uint4{};
        }
#pragma unroll
        for (int b = 0; b < batch; ++b)
#pragma unroll
          for (int s = 0; s < stripes; ++s) {
            const uint4 low = a[b][s][0], high = a[b][s][1];
            multiply<Element>(sums[s][n], low.x, high.x, low.y, high.y, x[b].x, x[b].y);
            multiply<Element>(sums[s][n], low.z, high.z, low.w, high.w, x[b].z, x[b].w);
          }
      }
    }
    // Tile after tile, token after token, 16 weight rows each.
    __syncthreads();
#pragma unroll
    for (int s = 0; s < stripes; ++s)
#pragma unroll
      for (int n = 0; n < tiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          partial[warp][(s * tiles + n) * 128 + (2 * quarter + i % 2) * 16 + group + i / 2 * 8] =
              sums[s][n][i];
    __syncthreads();
    for (int i = thread; i < stripes * tiles * 8 * each; i += streaming_threads) {
      const int output = i % each, token = i / each % 8;
      const int tile = i / (each * 8), s = tile / tiles, n = tile % tiles;
      const int row = first + n * 8 + token, index = first_output + s * each + output;
      if (row >= expert.rows || index >= outputs) continue;
      const int at = tile * 128 + token * 16 + output;
      float sum = 0.0f, up = 0.0f;
#pragma unroll
      for (int w = 0; w < block_warps; ++w) {
        sum += partial[w][at];
        if constexpr (Task::gated) up += partial[w][at + 8];
      }
      task.finish(row, index, split, sum, up);
    }
  }
}

template <class Element, Phase phase, int stripes, int tiles>
__global__ void __launch_bounds__(streaming_threads)
    streaming_kernel(const __grid_constant__ Product product,
                     const __grid_constant__ FewSlots few) {
  stream_product<Element, phase, stripes, tiles>(
      product,
      {static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.z)},
      few);
}

}  // namespace sida::cuda
