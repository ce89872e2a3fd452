// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "launch.cuh"
#include "product.cuh"

namespace sida::cuda {

constexpr int general_threads = 256, general_rows = 32, general_outputs = 64, general_depth = 32;
/// Elements whose products are summed by themselves: one long sum would round as often as it has
/// terms.
constexpr int general_chunk = 4 * general_depth;

/// Any dtype and size, in f32: a block computes 64 outputs of one expert (blockIdx.y of the active
/// ones), 32 rows at a time; a thread 2 rows x 4 outputs.
template <class Element, Phase phase>
__global__ void __launch_bounds__(general_threads, 3) general_kernel(Product product) {
  constexpr int parts = phase == Phase::gated_up ? 2 : 1;
  __shared__ float x[general_depth][general_rows + 1];
  __shared__ float w[parts][general_depth][general_outputs + 1];
  wait_for_previous();
  let_next_start();
  if (static_cast<int>(blockIdx.y) >= *product.plan.active_count) return;
  const ActiveExpert expert = product.plan.active[blockIdx.y];
  const int slot = product.slabs.slot_of[expert.expert];
  if (slot < 0) return;
  const ExpertProduct<Element, phase> task{
      product, product.slabs.arena + slot * product.slabs.stride, expert};
  const int outputs = task.outputs(), depth = task.depth();
  const int first_output = static_cast<int>(blockIdx.x) * general_outputs;
  const int thread = static_cast<int>(threadIdx.x), tx = thread % 16, ty = thread / 16;

  for (int first = static_cast<int>(blockIdx.z) * general_rows; first < expert.rows;
       first += static_cast<int>(gridDim.z) * general_rows) {
    float sums[parts][2][4] = {}, totals[parts][2][4] = {};
    for (int k = 0; k < depth; k += general_depth) {
      __syncthreads();
      for (int i = thread; i < general_rows * general_depth; i += general_threads) {
        const int row = i / general_depth, at = i % general_depth;
        const bool inside = first + row < expert.rows && k + at < depth;
        x[at][row] = inside ? to_float(task.input(first + row)[k + at]) : 0.0f;
      }
#pragma unroll
      for (int p = 0; p < parts; ++p)
        for (int i = thread; i < general_outputs * general_depth; i += general_threads) {
          const int output = i / general_depth, at = i % general_depth;
          const bool inside = first_output + output < outputs && k + at < depth;
          w[p][at][output] =
              inside ? to_float(task.weights(p * outputs + first_output + output)[k + at]) : 0.0f;
        }
      __syncthreads();
#pragma unroll 8
      for (int at = 0; at < general_depth; ++at)
#pragma unroll
        for (int p = 0; p < parts; ++p)
#pragma unroll
          for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int o = 0; o < 4; ++o) sums[p][r][o] += x[at][2 * ty + r] * w[p][at][tx + 16 * o];
      const int next = k + general_depth;
      if (next % general_chunk != 0 && next < depth) continue;
#pragma unroll
      for (int p = 0; p < parts; ++p)
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
          for (int o = 0; o < 4; ++o) {
            totals[p][r][o] += sums[p][r][o];
            sums[p][r][o] = 0.0f;
          }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int o = 0; o < 4; ++o) {
        const int row = first + 2 * ty + r, output = first_output + tx + 16 * o;
        if (row < expert.rows && output < outputs)
          task.finish(row, output, 0, totals[0][r][o], totals[parts - 1][r][o]);
      }
  }
}

}  // namespace sida::cuda
