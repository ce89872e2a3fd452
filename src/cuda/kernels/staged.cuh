// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "activation.cuh"
#include "copies.cuh"

/// How a warp writes a tile that wgmma left in its registers: through shared memory, in whole
/// lines.
namespace sida::cuda {

/// A warp's 16 rows of 64 outputs of 16 bits, whose 16-byte pieces are swizzled.
constexpr int staged_rows = 16, staged_outputs = 64;
struct alignas(128) StagedRows {
  std::byte bytes[staged_rows * staged_outputs * 2];
};

/// Four 8 x 8 matrices of 16 bits to shared memory; lane l gives where row l % 8 of matrix l / 8
/// is.
__device__ inline void store_matrices(unsigned to, const unsigned (&words)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

/// Adds biases from output `column` on to a lane's sums of `pairs` times 8 outputs.
template <class Element, int pairs, class Task>
__device__ void add_bias(const Task& task, int column, int first, float* sums) {
  const int outputs = task.outputs(), quarter = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int p = 0; p < pairs; ++p) {
    const int at = min(column + 8 * p, outputs - 8) + 2 * quarter;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float bias = task.bias(first + at + i);
      sums[4 * p + i] += bias;
      sums[4 * p + 2 + i] += bias;
    }
  }
}

/// Finishes and writes what a warp holds: of the expert's rows `row` to `row` + 15, outputs from
/// `column` on, 8 for each of `pairs`. A lane's sums of pair p are outputs 8 p + 2 (lane % 4) +
/// {0, 1} of row lane / 4, then of the row 8 behind it; with a gate those beside it are `ups`.
template <class Task, class Element, int pairs, Act activation>
__device__ void write_staged(const Task& task, int row, int column, const float* sums,
                             const float* ups, StagedRows& staged) {
  constexpr int each = staged_outputs / 8;
  static_assert(pairs % each == 0);
  const int outputs = task.outputs(), lane = static_cast<int>(threadIdx.x) % 32;
  const float limit = task.product.shape.limit;
  const unsigned base = shared_address(&staged);
  const unsigned store_row = base + lane % 16 * 128;
  auto* const out = static_cast<Element*>(task.product.out) +
                    static_cast<std::size_t>(task.expert.row_begin + row) * outputs;
#pragma unroll
  for (int group = 0; group < pairs; group += each) {
    const int first = column + 8 * group;
    if (first >= outputs) break;
#pragma unroll
    for (int p = 0; p < each; p += 2) {
      unsigned words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = 4 * (group + p + i / 2) + i % 2 * 2;
        const auto pair = Pair<Element>::of(
            finished<Task, activation>(sums[at], Task::gated ? ups[at] : 0.0f, limit),
            finished<Task, activation>(sums[at + 1], Task::gated ? ups[at + 1] : 0.0f, limit));
        words[i] = *reinterpret_cast<const unsigned*>(&pair);
      }
      store_matrices(store_row + ((p + lane / 16) ^ lane % 8) * 16, words);
    }
    __syncwarp();
    const int piece = lane % 8;
#pragma unroll
    for (int i = 0; i < staged_rows / 4; ++i) {
      const int at = 4 * i + lane / 8;
      const uint4 bits =
          *reinterpret_cast<const uint4*>(staged.bytes + at * 128 + (piece ^ at % 8) * 16);
      if (row + at < task.expert.rows && first + 8 * piece < outputs)
        *reinterpret_cast<uint4*>(out + static_cast<std::size_t>(at) * outputs + first +
                                  8 * piece) = bits;
    }
    __syncwarp();
  }
}

}  // namespace sida::cuda
