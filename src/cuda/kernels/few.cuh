// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "routing.cuh"

namespace sida::cuda {

/// Plans few assignments, each a lane of the warp that calls, into what `plan` points to.
__device__ inline void plan_few(const LayerShape& shape, const Assignment& mine, const Plan& plan) {
  const int lane = static_cast<int>(threadIdx.x % 32), assignments = shape.tokens * shape.top_k;
  bool invalid = false;
  const int e = lane < assignments ? expert_of(mine, shape.experts, invalid) : -1;
  const unsigned unknown = __ballot_sync(~0u, invalid), same = __match_any_sync(~0u, e);
  const unsigned before = same & ((1u << lane) - 1);
  const unsigned firsts = __ballot_sync(~0u, e >= 0 && before == 0);
  int row = 0, index = 0;
  for (int other_lane = 0; other_lane < assignments; ++other_lane) {
    const int other = __shfl_sync(~0u, e, other_lane);
    if (other < 0 || other >= e) continue;
    ++row;
    index += firsts >> other_lane & 1;
  }
  const int rows = e >= 0 ? __popc(same) : 0;
  if (firsts >> lane & 1) plan.active[index] = {e, row, rows, 0};
  row = e >= 0 ? row + __popc(before) : -1;
  if (lane < assignments) {
    plan.row_of[lane] = row;
    plan.group_rows[lane] = rows;
  }
  if (row >= 0) plan.order[row] = lane;
  if (lane == 0) {
    *plan.invalid = __popc(unknown);
    *plan.active_count = __popc(firsts);
  }
}

/// A block's own plan of few assignments, in shared memory.
struct FewPlan {
  ActiveExpert active[few_assignments];
  std::int32_t order[few_assignments], row_of[few_assignments], group_rows[few_assignments];
  float weights[few_assignments];
  std::int32_t active_count, invalid;

  /// Made by all threads of a block; one block of the grid `tells` the host.
  __device__ Plan make(const LayerShape& shape, const GivenRouting& given,
                       const TakenRouting& taken, bool tells) {
    Plan plan{};
    plan.active = active;
    plan.active_count = &active_count;
    plan.invalid = &invalid;
    plan.order = order;
    plan.row_of = row_of;
    plan.group_rows = group_rows;
    if (threadIdx.x < 32) {
      const int lane = static_cast<int>(threadIdx.x);
      Assignment mine;
      if (lane < shape.tokens * shape.top_k) {
        mine = given_assignment(shape, given, lane);
        weights[lane] = mine.weight;
        if (tells) take(shape, taken, lane, mine);
      }
      plan_few(shape, mine, plan);
    }
    __syncthreads();
    return plan;
  }
};

}  // namespace sida::cuda
