// SPDX-License-Identifier: Apache-2.0
#include "grouped.hpp"

#include "hopper.cuh"
#include "launch.cuh"
#include "schedule.cuh"
#include "staged.cuh"
#include "tensor_map.hpp"
#include "tickets.cuh"

namespace sida::cuda {
namespace {

constexpr int tile_rows = 128, tile_outputs = 256, tile_depth = 64, stages = 4;
constexpr int rows_bytes = tile_rows * tile_depth * 2,
              outputs_bytes = tile_outputs * tile_depth * 2;
constexpr int copying_threads = 128, multiplying_warps = 8;
constexpr int hopper_threads = copying_threads + multiplying_warps * 32;

/// A block's dynamic shared memory, behind padding to 1024 bytes.
struct Stages {
  std::byte rows[stages][rows_bytes];
  std::byte outputs[stages][outputs_bytes];
  StagedRows staged[multiplying_warps];
  std::uint64_t full[stages], empty[stages];
  Told told;
};
constexpr std::size_t stages_bytes = sizeof(Stages) + 1024;

/// A block computes tiles of 128 rows x 256 weight rows (with a gate: 128 of the gate's and the 128
/// beside them). One warpgroup brings both operands into a ring of four stages: weights as tensor
/// copies over all slots, activations likewise, tokens row by row where the plan says. The other
/// two multiply 64 rows each, one of them resting where a tile has no more than 64. The two blocks
/// of a cluster, where they multiply the same weights, bring half of them each and copy it to both,
/// which takes a third of the load from L2.
template <class Element, Phase phase>
__global__ void __launch_bounds__(hopper_threads, 1)
    hopper_kernel(const __grid_constant__ Product product,
                  const __grid_constant__ CUtensorMap weights,
                  const __grid_constant__ CUtensorMap input) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Task = ExpertProduct<Element, phase>;
  constexpr bool gathers = !Task::down;
  constexpr int outputs_each = Task::gated ? tile_outputs / 2 : tile_outputs;
  extern __shared__ std::byte memory[];
  Stages& ring = *reinterpret_cast<Stages*>(memory + (1024 - shared_address(memory) % 1024) % 1024);

  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  // The plan has been written before the previous kernel let this one start; a down product
  // waits for activations only.
  if constexpr (gathers) wait_for_previous();
  const int outputs = Task::down ? product.shape.hidden : product.shape.intermediate;
  const int depth = Task::down ? product.shape.intermediate : product.shape.hidden;
  const unsigned rank = hopper::rank_in_cluster();
  using Schedule = TileSchedule<tile_rows, outputs_each, true, cluster_blocks>;
  __shared__ typename Schedule::Table table;
  if (warp == 0) Schedule::count(product, outputs, table);
  if (thread == 32) {
    for (int s = 0; s < stages; ++s) {
      hopper::init_barrier(&ring.full[s], gathers ? copying_threads + 1 : 2);
      hopper::init_barrier(&ring.empty[s], cluster_blocks * multiplying_warps);
    }
    ring.told.init();
    hopper::fence_barriers();
    hopper::fence_shared();
  }
  __syncthreads();
  hopper::meet_cluster();
  let_next_start();
  Schedule schedule(product, outputs, table);
  const bool takes = thread == 0 && rank == 0;
  Tickets tickets(ring.told, &product.plan.taken_tiles[Task::down], schedule.sets(), takes,
                  thread == 0);
  const int steps = (depth + tile_depth - 1) / tile_depth;
  hopper::Turn<stages> turn;

  if (thread < copying_threads) {
    hopper::give_registers<72>();
    const bool copies_weights = thread == 0, copies_rows = gathers || thread == 32;
    if constexpr (!gathers)
      if (!copies_weights) wait_for_previous();
    if (copies_weights || copies_rows)
      for (int number; tickets.next(number);) {
        const Tile tile = schedule.at(number, static_cast<int>(rank));
        const Task task{product, nullptr, tile.expert};
        const int chunk = thread % 8, lane_row = thread / 8;
        int sources[tile_rows / 16];
        if constexpr (gathers)
#pragma unroll
          for (int i = 0; i < tile_rows / 16; ++i)
            sources[i] = task.input_row(min(tile.row + lane_row + 16 * i, tile.expert.rows - 1));
        for (int step = 0; step < steps; ++step, turn.next()) {
          if (takes && step == steps / 2) tickets.tell();
          hopper::wait(&ring.empty[turn.stage], turn.parity ^ 1);
          std::uint64_t* const full = &ring.full[turn.stage];
          const int k = step * tile_depth;
          if (copies_weights) {
            hopper::arrive_expecting(full, outputs_bytes);
#pragma unroll
            for (unsigned half = 0; half < 2; ++half) {
              std::byte* const to = ring.outputs[turn.stage] + half * (outputs_bytes / 2);
              const int row = tile.output + half * (Task::gated ? outputs : tile_outputs / 2);
              if (!tile.shared)
                hopper::copy_tile(to, weights, k, row, tile.slot, full);
              else if (half == rank)
                hopper::copy_tile_to_both(to, weights, k, row, tile.slot, full);
            }
          }
          if constexpr (gathers) {
            const unsigned to = shared_address(ring.rows[turn.stage]) + lane_row * 128 +
                                (chunk ^ (lane_row % 8)) * 16;
            const int at = k + chunk * 8;
            const bool inside = at < depth;
            const Element* const from = static_cast<const Element*>(product.in) + (inside ? at : 0);
#pragma unroll
            for (int i = 0; i < tile_rows / 16; ++i)
              if (tile.row + lane_row + 16 * i < tile.expert.rows)
                copy_16(to + i * 16 * 128, from + static_cast<std::size_t>(sources[i]) * depth,
                        inside);
            hopper::arrive_after_copies(full);
          } else if (copies_rows) {
            hopper::arrive_expecting(full, rows_bytes);
            hopper::copy_tile(ring.rows[turn.stage], input, k, tile.expert.row_begin + tile.row,
                              full);
          }
        }
      }
    if constexpr (!gathers)
      if (copies_weights) wait_for_previous();
  } else {
    hopper::take_registers<216>();
    if constexpr (!gathers) wait_for_previous();
    const int group = thread / copying_threads - 1, lane = thread % 32;
    for (int number; tickets.next(number);) {
      const Tile tile = schedule.at(number, static_cast<int>(rank));
      const int first_row = tile.row + group * 64;
      if (first_row >= tile.expert.rows) {
        for (int step = 0; step < steps; ++step, turn.next()) {
          hopper::wait(&ring.full[turn.stage], turn.parity);
          if (lane < cluster_blocks) hopper::arrive_in(lane, &ring.empty[turn.stage]);
        }
        continue;
      }
      float sums[128];
      int previous = 0;
      for (int step = 0; step < steps; ++step, turn.next()) {
        hopper::wait(&ring.full[turn.stage], turn.parity);
        if constexpr (gathers) hopper::fence_shared();
        const std::uint64_t rows = hopper::matrix(ring.rows[turn.stage] + group * rows_bytes / 2);
        const std::uint64_t columns = hopper::matrix(ring.outputs[turn.stage]);
        hopper::begin_multiply();
#pragma unroll
        for (int k = 0; k < tile_depth / 16; ++k)
          hopper::multiply<Element, tile_outputs>(sums, rows + 2 * k, columns + 2 * k,
                                                  step > 0 || k > 0);
        hopper::end_multiply();
        hopper::wait_multiply<1>();
        if (step > 0 && lane < cluster_blocks) hopper::arrive_in(lane, &ring.empty[previous]);
        previous = turn.stage;
      }
      hopper::wait_multiply<0>();
      if (lane < cluster_blocks) hopper::arrive_in(lane, &ring.empty[previous]);

      const Task task{product, product.slabs.arena + tile.slot * product.slabs.stride, tile.expert};
      constexpr int pairs = outputs_each / 8;
      float* const ups = sums + (Task::gated ? 4 * pairs : 0);
      if (task.has_bias()) {
        add_bias<Element, pairs>(task, tile.output, 0, sums);
        if constexpr (Task::gated) add_bias<Element, pairs>(task, tile.output, outputs, ups);
      }
      with_activation(task, [&](auto activation) {
        write_staged<Task, Element, pairs, activation.value>(
            task, first_row + warp % 4 * 16, tile.output, sums, ups, ring.staged[warp - 4]);
      });
    }
  }
  hopper::meet_cluster();  // whose other block may still copy here
#endif
}

template <class Element, Phase phase>
void launch_phase(const Product& product, cudaStream_t stream) {
  constexpr bool down = phase == Phase::down, gated = phase == Phase::gated_up;
  const LayerShape& shape = product.shape;
  const auto hidden = static_cast<std::size_t>(shape.hidden);
  const auto intermediate = static_cast<std::size_t>(shape.intermediate);
  const std::size_t outputs = down ? hidden : gated ? 2 * intermediate : intermediate;
  const std::size_t depth = down ? intermediate : hidden;
  const std::byte* part =
      product.slabs.arena + (down ? product.slabs.down_offset : product.slabs.up_offset);
  const CUtensorMap weights =
      tensor_map(shape.dtype, part, {depth, outputs, any_slot}, {2 * depth, product.slabs.stride},
                 {tile_depth, tile_outputs / 2, 1});
  const std::size_t rows =
      down ? static_cast<std::size_t>(shape.tokens) * static_cast<std::size_t>(shape.top_k)
           : static_cast<std::size_t>(shape.tokens);
  const CUtensorMap input =
      tensor_map(shape.dtype, product.in, {depth, rows}, {2 * depth}, {tile_depth, tile_rows});
  const auto kernel = hopper_kernel<Element, phase>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, stages_bytes),
        "reserve shared memory");
  const auto clusters =
      static_cast<unsigned>(device_attribute(cudaDevAttrMultiProcessorCount) / cluster_blocks);
  launch_clusters("launch a grouped product", kernel, cluster_blocks,
                  dim3(clusters * cluster_blocks), hopper_threads, stages_bytes, stream, product,
                  weights, input);
}

}  // namespace

void launch_hopper(const Product& product, Phase phase, Stream stream) {
  with_product(product, phase, [&](auto element, auto constant) {
    launch_phase<decltype(element), constant.value>(product, stream);
  });
}

}  // namespace sida::cuda
