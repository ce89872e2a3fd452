// SPDX-License-Identifier: Apache-2.0
#include "grouped.hpp"

#include "activation.cuh"
#include "copies.cuh"
#include "launch.cuh"
#include "multiply.cuh"
#include "schedule.cuh"

namespace sida::cuda {
namespace {

constexpr int tile_rows = 128, tile_outputs = 128, tile_depth = 64, stages = 3;
constexpr int operand_bytes = tile_rows * tile_depth * 2;
constexpr int grouped_threads = 256, copied_rows = grouped_threads / 8;
constexpr std::size_t shared_bytes = 2 * stages * operand_bytes;

/// Four 8 x 8 matrices of 16 bits, from rows of 128 bytes whose 16-byte pieces are swizzled.
__device__ inline void load_matrices(unsigned (&to)[4], unsigned base, int row, int piece) {
  const unsigned from = base + row * 128 + (piece ^ (row % 8)) * 16;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from));
}

/// A block computes tiles of 128 rows x 128 weight rows (with a gate: 64 of the gate's and the 64
/// beside them), a warp 64 rows x 32 of the others, from a ring of three stages.
template <class Element, Phase phase>
__global__ void __launch_bounds__(grouped_threads) grouped_kernel(Product product) {
  using Task = ExpertProduct<Element, phase>;
  constexpr int outputs_each = Task::gated ? tile_outputs / 2 : tile_outputs;
  extern __shared__ __align__(128) std::byte memory[];
  wait_for_previous();
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int outputs = Task::down ? product.shape.hidden : product.shape.intermediate;
  const int depth = Task::down ? product.shape.intermediate : product.shape.hidden;
  using Schedule = TileSchedule<tile_rows, outputs_each, false>;
  __shared__ typename Schedule::Table table;
  if (warp == 0) Schedule::count(product, outputs, table);
  __syncthreads();
  let_next_start();
  Schedule schedule(product, outputs, table);
  Rounds rounds(schedule.sets());
  const int steps = (depth + tile_depth - 1) / tile_depth;
  const int piece = thread % 8, copied = thread / 8;
  const int warp_row = warp % 2 * 64, warp_column = warp / 2 * (Task::gated ? 16 : 32);
  const unsigned base = shared_address(memory);

  for (int number; rounds.next(number);) {
    const Tile tile = schedule.at(number);
    const Task task{product, product.slabs.arena + tile.slot * product.slabs.stride, tile.expert};
    int rows[tile_rows / copied_rows], weights[tile_outputs / copied_rows];
#pragma unroll
    for (int i = 0; i < tile_rows / copied_rows; ++i) {
      const int at = copied + copied_rows * i;
      rows[i] = task.input_row(min(tile.row + at, tile.expert.rows - 1));
      const int output = min(tile.output + at % outputs_each, outputs - 1);
      weights[i] = at < outputs_each ? output : outputs + output;
    }
    const auto copy = [&](int step) {
      const int k = step * tile_depth + piece * 8;
      const bool inside = k < depth;
      const int from = inside ? k : 0;
      const unsigned to =
          base + step % stages * 2 * operand_bytes + copied * 128 + (piece ^ (copied % 8)) * 16;
#pragma unroll
      for (int i = 0; i < tile_rows / copied_rows; ++i) {
        const auto* row = static_cast<const Element*>(product.in) +
                          static_cast<std::size_t>(rows[i]) * depth + from;
        copy_16(to + i * copied_rows * 128, row, inside);
        copy_16(to + operand_bytes + i * copied_rows * 128, task.weights(weights[i]) + from,
                inside);
      }
    };
    __syncthreads();
#pragma unroll
    for (int step = 0; step < stages - 1; ++step) {
      if (step < steps) copy(step);
      commit_copies();
    }
    float sums[4][4][4] = {};
    for (int step = 0; step < steps; ++step) {
      wait_copies<stages - 2>();
      __syncthreads();
      if (step + stages - 1 < steps) copy(step + stages - 1);
      commit_copies();
      const unsigned row_base = base + step % stages * 2 * operand_bytes;
#pragma unroll
      for (int k = 0; k < tile_depth / 16; ++k) {
        unsigned a[4][4], b[2][4];
#pragma unroll
        for (int m = 0; m < 4; ++m)
          load_matrices(a[m], row_base, warp_row + m * 16 + lane % 16, 2 * k + lane / 16);
#pragma unroll
        for (int n = 0; n < 2; ++n)
          load_matrices(
              b[n], row_base + operand_bytes,
              warp_column + n * (Task::gated ? outputs_each : 16) + lane / 16 * 8 + lane % 8,
              2 * k + lane / 8 % 2);
#pragma unroll
        for (int m = 0; m < 4; ++m)
#pragma unroll
          for (int n = 0; n < 4; ++n)
            multiply<Element>(sums[m][n], a[m][0], a[m][1], a[m][2], a[m][3], b[n / 2][n % 2 * 2],
                              b[n / 2][n % 2 * 2 + 1]);
      }
    }
    wait_copies<0>();
#pragma unroll
    for (int m = 0; m < 4; ++m)
      finish_pairs<Task, Element, Task::gated ? 2 : 4>(
          task, tile.row + warp_row + m * 16 + lane / 4, tile.output + warp_column,
          [&](int half, int pair, int i) { return sums[m][pair][half * 2 + i]; },
          [&](int half, int pair, int i) { return sums[m][(pair + 2) % 4][half * 2 + i]; });
  }
}

template <class Element, Phase phase>
void launch_phase(const Product& product, cudaStream_t stream) {
  const auto kernel = grouped_kernel<Element, phase>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes)),
        "reserve shared memory");
  int each = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, grouped_threads, shared_bytes),
        "count the blocks that fit a multiprocessor");
  const int blocks = each * device_attribute(cudaDevAttrMultiProcessorCount);
  launch_shared("launch a grouped product", kernel, dim3(static_cast<unsigned>(blocks)),
                grouped_threads, shared_bytes, stream, product);
}

}  // namespace

void launch_grouped(const Product& product, Phase phase, Stream stream) {
  with_product(product, phase, [&](auto element, auto constant) {
    launch_phase<decltype(element), constant.value>(product, stream);
  });
}

}  // namespace sida::cuda
