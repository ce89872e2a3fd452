// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "product.cuh"

namespace sida::cuda {

/// Tiles of rows whose outputs are computed side by side, so that they meet in L2.
constexpr int neighbour_tiles = 16;

/// A tile of one expert's product: its rows from `row` on, none where they are past its last,
/// outputs from `output` on. `shared`: the cluster's other block has other rows and the same
/// outputs.
struct Tile {
  ActiveExpert expert;
  int slot, row, output;
  bool shared;
};

/// An expert that is present, as a schedule keeps it.
struct ScheduledExpert {
  ActiveExpert expert;
  int slot;
};

/// What a block knows of a product's sets of tiles, in shared memory: the first set of each expert,
/// and, if it `keeps` them, the experts, so that the next tile needs no loads that are waited for.
template <bool keeps>
struct ScheduleTable {
  int first_set[max_experts + 1];
  ScheduledExpert experts[keeps ? max_experts : 1];
};

/// The tiles of all experts of a product in sets, one tile for each of the `blocks` (1 or 2) of a
/// cluster, numbered through. Two blocks have neighbouring rows and the same outputs, or
/// neighbouring outputs where rows for one tile are left.
template <int tile_rows, int tile_outputs, bool keeps, int blocks = 1>
class TileSchedule {
 public:
  using Table = ScheduleTable<keeps>;

  /// Counts each present expert's sets; by one warp, before a barrier of the block.
  static __device__ void count(const Product& product, int outputs, Table& table) {
    const int lane = static_cast<int>(threadIdx.x % 32), active = *product.plan.active_count;
    const int output_tiles = parts_of(outputs, tile_outputs);
    int before = 0;
    for (int first = 0; first < active; first += 32) {
      int sets = 0;
      if (first + lane < active) {
        const ActiveExpert expert = product.plan.active[first + lane];
        const int row_tiles = parts_of(expert.rows, tile_rows);
        const int slot = product.slabs.slot_of[expert.expert];
        if constexpr (keeps) table.experts[first + lane] = {expert, slot};
        if (slot >= 0)
          sets = row_tiles / blocks * output_tiles +
                 parts_of(row_tiles % blocks * output_tiles, blocks);
      }
      int sum = sets;
      for (int distance = 1; distance < 32; distance *= 2) {
        const int other = __shfl_up_sync(~0u, sum, distance);
        if (lane >= distance) sum += other;
      }
      if (first + lane < active) table.first_set[first + lane] = before + sum - sets;
      before += __shfl_sync(~0u, sum, 31);
    }
    if (lane == 0) table.first_set[active] = before;
  }

  __device__ TileSchedule(const Product& product, int outputs, const Table& table)
      : product_(product),
        table_(table),
        output_tiles_(parts_of(outputs, tile_outputs)),
        sets_(table.first_set[*product.plan.active_count]) {}

  /// How many sets there are.
  __device__ int sets() const { return sets_; }

  /// The tile of set `number`, not below that of the call before, that is block `rank`'s.
  __device__ Tile at(int number, int rank = 0) {
    while (number >= table_.first_set[active_ + 1]) ++active_;
    const int local = number - table_.first_set[active_];
    const auto [expert, slot] = expert_at(active_);
    const int row_tiles = parts_of(expert.rows, tile_rows), row_sets = row_tiles / blocks;
    if (local >= row_sets * output_tiles_) {
      const int output = (local - row_sets * output_tiles_) * blocks + rank;
      const bool any = output < output_tiles_;
      return {expert, slot, (row_tiles - any) * tile_rows, any ? output * tile_outputs : 0, false};
    }
    constexpr int neighbours = neighbour_tiles / blocks;
    const int group = local / (neighbours * output_tiles_);
    const int inside = local % (neighbours * output_tiles_);
    const int wide = min(neighbours, row_sets - group * neighbours);
    return {expert, slot, ((group * neighbours + inside % wide) * blocks + rank) * tile_rows,
            inside / wide * tile_outputs, blocks > 1};
  }

 private:
  __device__ ScheduledExpert expert_at(int index) const {
    if constexpr (keeps) return table_.experts[index];
    const ActiveExpert expert = product_.plan.active[index];
    return {expert, product_.slabs.slot_of[expert.expert]};
  }

  const Product& product_;
  const Table& table_;
  int output_tiles_, sets_, active_ = 0;
};

/// The numbers of a block's tiles, of `count`: in each round every block takes one of as many as
/// there are blocks, each time the one behind that of the round before. The last tile of an expert
/// has few rows, and would else be the same block's for one expert after the other.
class Rounds {
 public:
  __device__ explicit Rounds(int count) : count_(count) {}

  __device__ bool next(int& number) {
    const int blocks = static_cast<int>(gridDim.x);
    number = round_ * blocks + (static_cast<int>(blockIdx.x) + round_) % blocks;
    ++round_;
    return number < count_;
  }

 private:
  int count_, round_ = 0;
};

}  // namespace sida::cuda
