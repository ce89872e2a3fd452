// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "launch.cuh"
#include "product.cuh"

/// Products of f32 weights whose rows begin at multiples of 16 bytes, in f32 arithmetic.
namespace sida::cuda {

constexpr int full_threads = 256;
constexpr int dot_outputs = full_threads / 32, dot_rows = 4;
constexpr int full_rows = 128, full_outputs = 128, full_depth = 8;
/// Steps whose products are summed by themselves: one long sum would round as often as it has
/// terms.
constexpr int full_chunk = 16;
constexpr int full_sums = full_rows * full_outputs / full_threads;
template <Phase phase>
constexpr std::size_t totals_bytes = phase == Phase::gated_up
                                         ? 0
                                         : full_rows* full_outputs * sizeof(float);

/// For few rows: a warp computes one output (with a gate: and the one beside it) of one expert
/// (blockIdx.y of the active ones), four rows at a time.
template <Phase phase>
__global__ void __launch_bounds__(full_threads, 2) dot_kernel(Product product) {
  using Task = ExpertProduct<float, phase>;
  wait_for_previous();
  let_next_start();
  if (static_cast<int>(blockIdx.y) >= *product.plan.active_count) return;
  const ActiveExpert expert = product.plan.active[blockIdx.y];
  const int slot = product.slabs.slot_of[expert.expert];
  const int output =
      static_cast<int>(blockIdx.x) * dot_outputs + static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const Task task{product, product.slabs.arena + slot * product.slabs.stride, expert};
  const int outputs = task.outputs(), pieces = task.depth() / 4;
  if (slot < 0 || output >= outputs) return;
  const auto* gate = reinterpret_cast<const float4*>(task.weights(output));
  const auto* beside =
      reinterpret_cast<const float4*>(task.weights(Task::gated ? outputs + output : output));
  for (int first = 0; first < expert.rows; first += dot_rows) {
    const float4* inputs[dot_rows];
#pragma unroll
    for (int r = 0; r < dot_rows; ++r)
      inputs[r] = reinterpret_cast<const float4*>(task.input(min(first + r, expert.rows - 1)));
    float sums[dot_rows] = {}, ups[dot_rows] = {};
#pragma unroll 2
    for (int i = lane; i < pieces; i += 32) {
      const float4 w = gate[i];
      float4 u{};
      if constexpr (Task::gated) u = beside[i];
#pragma unroll
      for (int r = 0; r < dot_rows; ++r) {
        const float4 x = inputs[r][i];
        sums[r] += w.x * x.x + w.y * x.y + w.z * x.z + w.w * x.w;
        if constexpr (Task::gated) ups[r] += u.x * x.x + u.y * x.y + u.z * x.z + u.w * x.w;
      }
    }
    float sum = 0.0f, up = 0.0f;
#pragma unroll
    for (int r = 0; r < dot_rows; ++r) {
      for (int distance = 16; distance > 0; distance /= 2) {
        sums[r] += __shfl_xor_sync(~0u, sums[r], distance);
        if constexpr (Task::gated) ups[r] += __shfl_xor_sync(~0u, ups[r], distance);
      }
      if (lane == r) sum = sums[r], up = ups[r];
    }
    if (lane < dot_rows && first + lane < expert.rows)
      task.finish(first + lane, output, 0, sum, up);
  }
}

/// For many rows: a block computes 128 weight rows (with a gate: 64 of the gate's and the 64 beside
/// them) of one expert (blockIdx.y of the active ones), 128 rows at a time, a thread 8 x 8.
template <Phase phase>
__global__ void __launch_bounds__(full_threads, phase == Phase::down ? 2 : 1)
    tiled_kernel(Product product) {
  using Task = ExpertProduct<float, phase>;
  constexpr int outputs_each = Task::gated ? full_outputs / 2 : full_outputs;
  static_assert(full_rows * full_depth == 4 * full_threads && full_outputs == full_rows,
                "a thread copies 16 bytes of either operand");
  __shared__ __align__(16) float x[2][full_depth][full_rows + 4];
  __shared__ __align__(16) float w[2][full_depth][full_outputs + 4];
  // One block with a gate fills a multiprocessor and has registers to spare; else a column each.
  extern __shared__ float shared_totals[][full_threads];
  float own_totals[Task::gated ? full_sums : 1];
  wait_for_previous();
  let_next_start();
  if (static_cast<int>(blockIdx.y) >= *product.plan.active_count) return;
  const ActiveExpert expert = product.plan.active[blockIdx.y];
  const int slot = product.slabs.slot_of[expert.expert];
  if (slot < 0) return;
  const Task task{product, product.slabs.arena + slot * product.slabs.stride, expert};
  const int outputs = task.outputs(), depth = task.depth();
  const int first_output = static_cast<int>(blockIdx.x) * outputs_each;
  const int thread = static_cast<int>(threadIdx.x), tx = thread % 16, ty = thread / 16;
  const auto total = [&](int i) -> float& {
    if constexpr (Task::gated)
      return own_totals[i];
    else
      return shared_totals[i][thread];
  };
  const int copied = thread / 2, piece = thread % 2 * 4;
  const int steps = (depth + full_depth - 1) / full_depth;

  const int output = min(first_output + copied % outputs_each, outputs - 1);
  const float* const weights = task.weights(copied < outputs_each ? output : outputs + output);
  for (int first = static_cast<int>(blockIdx.z) * full_rows; first < expert.rows;
       first += static_cast<int>(gridDim.z) * full_rows) {
    const float* const input = task.input(min(first + copied, expert.rows - 1));
    float4 next_x, next_w;
    const auto load = [&](int step) {
      const int k = step * full_depth + piece;
      next_x = k < depth ? *reinterpret_cast<const float4*>(input + k) : float4{};
      next_w = k < depth ? *reinterpret_cast<const float4*>(weights + k) : float4{};
    };
    const auto store = [&](int buffer) {
      const float xs[4] = {next_x.x, next_x.y, next_x.z, next_x.w};
      const float ws[4] = {next_w.x, next_w.y, next_w.z, next_w.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        x[buffer][piece + j][copied] = xs[j];
        w[buffer][piece + j][copied] = ws[j];
      }
    };
    float sums[8][8] = {};
#pragma unroll
    for (int i = 0; i < full_sums; ++i) total(i) = 0.0f;
    load(0);
    __syncthreads();
    store(0);
    __syncthreads();
    for (int step = 0; step < steps; ++step) {
      if (step + 1 < steps) load(step + 1);
      const int buffer = step % 2;
#pragma unroll
      for (int k = 0; k < full_depth; ++k) {
        float a[8], b[8];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          *reinterpret_cast<float4*>(a + 4 * half) =
              *reinterpret_cast<const float4*>(&x[buffer][k][64 * half + 4 * ty]);
          *reinterpret_cast<float4*>(b + 4 * half) =
              *reinterpret_cast<const float4*>(&w[buffer][k][64 * half + 4 * tx]);
        }
#pragma unroll
        for (int r = 0; r < 8; ++r)
#pragma unroll
          for (int o = 0; o < 8; ++o) sums[r][o] += a[r] * b[o];
      }
      if (step + 1 < steps) store(1 - buffer);
      if ((step + 1) % full_chunk == 0 || step + 1 == steps) {
#pragma unroll
        for (int i = 0; i < full_sums; ++i) {
          total(i) += sums[i / 8][i % 8];
          sums[i / 8][i % 8] = 0.0f;
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < full_sums; ++i) sums[i / 8][i % 8] = total(i);
#pragma unroll
    for (int r = 0; r < 8; ++r)
#pragma unroll
      for (int o = 0; o < (Task::gated ? 4 : 8); ++o) {
        const int row = first + r / 4 * 64 + 4 * ty + r % 4;
        const int output = first_output + o / 4 * 64 + 4 * tx + o % 4;
        if (row < expert.rows && output < outputs)
          task.finish(row, output, 0, sums[r][o], sums[r][(o + 4) % 8]);
      }
  }
}

}  // namespace sida::cuda
