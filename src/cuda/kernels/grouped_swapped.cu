// SPDX-License-Identifier: Apache-2.0
#include "activation.cuh"
#include "grouped.hpp"
#include "hopper.cuh"
#include "launch.cuh"
#include "schedule.cuh"
#include "tensor_map.hpp"

namespace sida::cuda {
namespace {

constexpr int tile_rows = 128, tile_outputs = 128, tile_depth = 64, stages = 6;
constexpr int rows_bytes = tile_rows * tile_depth * 2,
              outputs_bytes = tile_outputs * tile_depth * 2;
constexpr int box_rows = 16;
constexpr int copying_threads = 128, multiplying_warps = 8;
constexpr int swapped_threads = copying_threads + multiplying_warps * 32;

/// A block's dynamic shared memory, behind padding to 1024 bytes.
struct Ring {
  std::byte outputs[stages][outputs_bytes];
  std::byte rows[stages][rows_bytes];
  std::uint64_t full[stages], empty[stages];
};
constexpr std::size_t ring_bytes = sizeof(Ring) + 1024;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// One warp brings weights, so that those of the next tile do not wait for its tokens' rows.
constexpr int gathering_threads = copying_threads - 32, gathered_rows = gathering_threads / 8;
using Turn = hopper::Turn<stages>;
using Sums = float[tile_rows / 2];

/// The products of a warpgroup's 64 weight rows with `columns` rows of the expert's, over all of
/// the contracted dimension.
template <class Element, int columns, bool gathered>
__device__ void sum_tile(Ring& ring, Turn& turn, int steps, int group, Sums& sums) {
  const bool first_lane = threadIdx.x % 32 == 0;
  int previous = 0;
  for (int step = 0; step < steps; ++step, turn.next()) {
    hopper::wait(&ring.full[turn.stage], turn.parity);
    if constexpr (gathered) hopper::fence_shared();
    const std::uint64_t weights =
        hopper::matrix(ring.outputs[turn.stage] + group * outputs_bytes / 2);
    const std::uint64_t rows = hopper::matrix(ring.rows[turn.stage]);
    hopper::begin_multiply();
#pragma unroll
    for (int k = 0; k < tile_depth / 16; ++k)
      hopper::multiply<Element, columns>(sums, weights + 2 * k, rows + 2 * k, step > 0 || k > 0);
    hopper::end_multiply();
    hopper::wait_multiply<1>();
    if (step > 0 && first_lane) hopper::arrive(&ring.empty[previous]);
    previous = turn.stage;
  }
  hopper::wait_multiply<0>();
  if (first_lane) hopper::arrive(&ring.empty[previous]);
}

/// An 8 x 8 matrix of 16 bits that lies across a warp, transposed.
__device__ inline unsigned transposed(unsigned word) {
  unsigned to;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(to) : "r"(word));
  return to;
}

/// Finishes what a lane of a warp holds of the expert's rows from `first_row` on: the products of
/// weight rows `lane / 4` and 8 behind it, which are outputs from `first_output` on and 8 behind
/// them, or one output and what stands beside its gate. Four lanes together write 16 bytes of a
/// row.
template <class Task, class Element, Act activation>
__device__ void finish_columns(const Task& task, int first_row, int first_output,
                               const Sums& sums) {
  constexpr int halves = Task::gated ? 1 : 2;
  const int outputs = task.outputs(), lane = static_cast<int>(threadIdx.x) % 32;
  const float limit = task.product.shape.limit;
  float bias[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int output = first_output + lane / 4 + (Task::gated ? 0 : 8 * half);
    bias[half] = output < outputs ? task.bias(output + (Task::gated ? half * outputs : 0)) : 0.0f;
  }
#pragma unroll
  for (int column = 0; column < tile_rows; column += 8) {
    if (first_row + column >= task.expert.rows) break;
    const int row = first_row + column + lane / 4;
#pragma unroll
    for (int half = 0; half < halves; ++half) {
      float values[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at = column / 2 + i;
        values[i] = finished<Task, activation>(sums[at + 2 * half] + bias[half],
                                               sums[at + 2] + bias[1], limit);
      }
      const auto pair = Pair<Element>::of(values[0], values[1]);
      const unsigned word = transposed(*reinterpret_cast<const unsigned*>(&pair));
      const int output = first_output + 8 * half + lane % 4 * 2;
      if (row >= task.expert.rows || output >= outputs) continue;
      const auto sorted = static_cast<std::size_t>(task.expert.row_begin + row);
      auto* const out = static_cast<Element*>(task.product.out) + sorted * outputs + output;
      *reinterpret_cast<unsigned*>(out) = word;
    }
  }
}

/// One warpgroup's part of a tile: as many columns as hold its rows.
template <class Task, class Element>
__device__ void multiply_tile(const Task& task, Ring& ring, Turn& turn, int steps, int group,
                              const Tile& tile) {
  Sums sums;
  const int rows = task.expert.rows - tile.row;
  if (rows <= 16)
    sum_tile<Element, 16, !Task::down>(ring, turn, steps, group, sums);
  else if (rows <= 64)
    sum_tile<Element, 64, !Task::down>(ring, turn, steps, group, sums);
  else
    sum_tile<Element, tile_rows, !Task::down>(ring, turn, steps, group, sums);
  constexpr int warp_outputs = Task::gated ? 8 : 16;
  const int warp = static_cast<int>(threadIdx.x) / 32 % 4;
  const int output = tile.output + (group * 4 + warp) * warp_outputs;
  with_activation(task, [&](auto activation) {
    finish_columns<Task, Element, activation.value>(task, tile.row, output, sums);
  });
}
#endif

/// A block computes tiles of 128 weight rows (with a gate: 64 of the gate's and the 64 beside them,
/// 8 and 8 in turn) x up to 128 rows. Weights are what wgmma calls the rows, so that few rows of an
/// expert are few columns. One warpgroup brings both operands into a ring of six stages: weights as
/// tensor copies over all slots, activations likewise, tokens row by row where the plan says. The
/// other two multiply 64 weight rows each.
template <class Element, Phase phase>
__global__ void __launch_bounds__(swapped_threads, 1)
    swapped_kernel(const __grid_constant__ Product product,
                   const __grid_constant__ CUtensorMap weights,
                   const __grid_constant__ CUtensorMap input) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Task = ExpertProduct<Element, phase>;
  constexpr bool gathers = !Task::down;
  constexpr int outputs_each = Task::gated ? tile_outputs / 2 : tile_outputs;
  extern __shared__ std::byte memory[];
  Ring& ring = *reinterpret_cast<Ring*>(memory + (1024 - shared_address(memory) % 1024) % 1024);

  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  // The plan has been written before the previous kernel let this one start; a down product
  // waits for activations only.
  if constexpr (gathers) wait_for_previous();
  const int outputs = Task::down ? product.shape.hidden : product.shape.intermediate;
  const int depth = Task::down ? product.shape.intermediate : product.shape.hidden;
  using Schedule = TileSchedule<tile_rows, outputs_each, true>;
  __shared__ typename Schedule::Table table;
  if (warp == 0) Schedule::count(product, outputs, table);
  if (thread == 32) {
    for (int s = 0; s < stages; ++s) {
      hopper::init_barrier(&ring.full[s], gathers ? gathering_threads + 1 : 2);
      hopper::init_barrier(&ring.empty[s], multiplying_warps);
    }
    hopper::fence_shared();
  }
  __syncthreads();
  let_next_start();
  Schedule schedule(product, outputs, table);
  Rounds rounds(schedule.sets());
  const int steps = (depth + tile_depth - 1) / tile_depth;
  Turn turn;

  if (thread < copying_threads) {
    hopper::give_registers<104>();
    const bool copies_weights = thread == 0, copies_rows = gathers ? thread >= 32 : thread == 32;
    if constexpr (!gathers)
      if (!copies_weights) wait_for_previous();
    if (copies_weights || copies_rows)
      for (int number; rounds.next(number);) {
        const Tile tile = schedule.at(number);
        const Task task{product, nullptr, tile.expert};
        const int rows = min(tile.expert.rows - tile.row, tile_rows);
        const std::uint64_t policy = hopper::kept(tile.expert.rows <= tile_rows);
        const int chunk = thread % 8, lane_row = thread / 8 - 4;
        constexpr int most_rows = parts_of(tile_rows, gathered_rows);
        int sources[most_rows];
        if (gathers && copies_rows)
#pragma unroll
          for (int i = 0; i < most_rows; ++i)
            sources[i] =
                task.input_row(min(tile.row + lane_row + gathered_rows * i, tile.expert.rows - 1));
        for (int step = 0; step < steps; ++step, turn.next()) {
          hopper::wait(&ring.empty[turn.stage], turn.parity ^ 1);
          std::uint64_t* const full = &ring.full[turn.stage];
          const int k = step * tile_depth;
          if (copies_weights) {
            hopper::arrive_expecting(full, outputs_bytes);
            if constexpr (Task::gated)
              hopper::copy_groups(ring.outputs[turn.stage], weights, k, tile.output / 8, tile.slot,
                                  full, policy);
            else
              hopper::copy_tile(ring.outputs[turn.stage], weights, k, tile.output, tile.slot, full,
                                policy);
          }
          if (gathers && copies_rows) {
            const int at = k + chunk * 8;
            const bool inside = at < depth;
            const Element* const from = static_cast<const Element*>(product.in) + (inside ? at : 0);
#pragma unroll
            for (int i = 0; i < most_rows; ++i) {
              const int row = lane_row + gathered_rows * i;
              if (row < rows)
                copy_16(shared_address(ring.rows[turn.stage]) + row * 128 + (chunk ^ row % 8) * 16,
                        from + static_cast<std::size_t>(sources[i]) * depth, inside);
            }
            hopper::arrive_after_copies(full);
          } else if (copies_rows) {
            constexpr int box_bytes = box_rows * tile_depth * 2;
            const int boxes = (rows + box_rows - 1) / box_rows;
            hopper::arrive_expecting(full, boxes * box_bytes);
            for (int i = 0; i < boxes; ++i)
              hopper::copy_tile(ring.rows[turn.stage] + i * box_bytes, input, k,
                                tile.expert.row_begin + tile.row + i * box_rows, full);
          }
        }
      }
    if constexpr (!gathers)
      if (copies_weights) wait_for_previous();
  } else {
    hopper::take_registers<200>();
    if constexpr (!gathers) wait_for_previous();
    const int group = thread / copying_threads - 1;
    for (int number; rounds.next(number);) {
      const Tile tile = schedule.at(number);
      const Task task{product, product.slabs.arena + tile.slot * product.slabs.stride, tile.expert};
      multiply_tile<Task, Element>(task, ring, turn, steps, group, tile);
    }
  }
#endif
}

/// Boxes of 128 weight rows. With a gate each 16 of them are 8 of the gate's and the 8 beside them,
/// so that both are one lane's.
CUtensorMap weights_map(const Product& product, Phase phase) {
  const LayerShape& shape = product.shape;
  const auto hidden = static_cast<std::size_t>(shape.hidden);
  const auto intermediate = static_cast<std::size_t>(shape.intermediate);
  const std::size_t stride = product.slabs.stride;
  const std::byte* const up = product.slabs.arena + product.slabs.up_offset;
  if (phase == Phase::gated_up)
    return tensor_map(shape.dtype, up, {hidden, 8, 2, intermediate / 8, any_slot},
                      {2 * hidden, 2 * hidden * intermediate, 16 * hidden, stride},
                      {tile_depth, 8, 2, tile_outputs / 16, 1});
  if (phase == Phase::up)
    return tensor_map(shape.dtype, up, {hidden, intermediate, any_slot}, {2 * hidden, stride},
                      {tile_depth, tile_outputs, 1});
  return tensor_map(shape.dtype, product.slabs.arena + product.slabs.down_offset,
                    {intermediate, hidden, any_slot}, {2 * intermediate, stride},
                    {tile_depth, tile_outputs, 1});
}

/// Boxes of 16 rows of a product's input.
CUtensorMap input_map(const Product& product, Phase phase) {
  const LayerShape& shape = product.shape;
  const bool down = phase == Phase::down;
  const auto depth = static_cast<std::size_t>(down ? shape.intermediate : shape.hidden);
  const auto rows =
      static_cast<std::size_t>(shape.tokens) * static_cast<std::size_t>(down ? shape.top_k : 1);
  return tensor_map(shape.dtype, product.in, {depth, rows}, {2 * depth}, {tile_depth, box_rows});
}

template <class Element, Phase phase>
void launch_phase(const Product& product, cudaStream_t stream) {
  const auto kernel = swapped_kernel<Element, phase>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, ring_bytes),
        "reserve shared memory");
  const int blocks = device_attribute(cudaDevAttrMultiProcessorCount);
  launch_shared("launch a grouped product", kernel, dim3(static_cast<unsigned>(blocks)),
                swapped_threads, ring_bytes, stream, product, weights_map(product, phase),
                input_map(product, phase));
}

}  // namespace

void launch_swapped(const Product& product, Phase phase, Stream stream) {
  with_product(product, phase, [&](auto element, auto constant) {
    launch_phase<decltype(element), constant.value>(product, stream);
  });
}

}  // namespace sida::cuda
