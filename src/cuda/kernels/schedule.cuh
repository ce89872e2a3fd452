// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "product.cuh"

namespace sida::cuda {

/// Tiles of rows whose outputs are computed side by side, so that they meet in L2.
constexpr int neighbour_tiles = 16;

/// A tile of one expert's product: its rows from `row` on, outputs from `output` on.
struct Tile {
  ActiveExpert expert;
  int slot, row, output;
};

/// The tiles of all experts of a product, numbered through and shared among blocks that stay.
class TileSchedule {
 public:
  /// Counts each present expert's tiles into `first_tile` [max_experts + 1], shared memory; by one
  /// warp, before a barrier of the block.
  static __device__ void count(const Product& product, int tile_rows, int output_tiles,
                               int* first_tile) {
    const int lane = static_cast<int>(threadIdx.x % 32), active = *product.plan.active_count;
    int before = 0;
    for (int first = 0; first < active; first += 32) {
      int tiles = 0;
      if (first + lane < active) {
        const ActiveExpert expert = product.plan.active[first + lane];
        if (product.slabs.slot_of[expert.expert] >= 0)
          tiles = (expert.rows + tile_rows - 1) / tile_rows * output_tiles;
      }
      int sum = tiles;
      for (int distance = 1; distance < 32; distance *= 2) {
        const int other = __shfl_up_sync(~0u, sum, distance);
        if (lane >= distance) sum += other;
      }
      if (first + lane < active) first_tile[first + lane] = before + sum - tiles;
      before += __shfl_sync(~0u, sum, 31);
    }
    if (lane == 0) first_tile[active] = before;
  }

  __device__ TileSchedule(const Product& product, const int* first_tile, int output_tiles)
      : product_(product),
        first_tile_(first_tile),
        output_tiles_(output_tiles),
        tiles_(first_tile[*product.plan.active_count]) {}

  /// The block's next tile, if there is one. In each round every block takes one of as many tiles
  /// as there are blocks, each time the one behind that of the round before: the last tile of an
  /// expert has few rows, and would else be the same block's for one expert after the other.
  template <int tile_rows, int tile_outputs>
  __device__ bool next(Tile& tile) {
    const int blocks = static_cast<int>(gridDim.x), first = round_ * blocks;
    const int number = first + (static_cast<int>(blockIdx.x) + round_) % blocks;
    ++round_;
    if (number >= tiles_) return false;
    tile = at<tile_rows, tile_outputs>(number);
    return true;
  }

 private:
  /// Tile `number`, not below that of the call before.
  template <int tile_rows, int tile_outputs>
  __device__ Tile at(int number) {
    while (number >= first_tile_[active_ + 1]) ++active_;
    const int local = number - first_tile_[active_];
    const int row_tiles = (first_tile_[active_ + 1] - first_tile_[active_]) / output_tiles_;
    const int group = local / (neighbour_tiles * output_tiles_);
    const int inside = local % (neighbour_tiles * output_tiles_);
    const int wide = min(neighbour_tiles, row_tiles - group * neighbour_tiles);
    const ActiveExpert expert = product_.plan.active[active_];
    return {expert, product_.slabs.slot_of[expert.expert],
            (group * neighbour_tiles + inside % wide) * tile_rows, inside / wide * tile_outputs};
  }

  const Product& product_;
  const int* first_tile_;
  int output_tiles_, tiles_, active_ = 0, round_ = 0;
};

}  // namespace sida::cuda
