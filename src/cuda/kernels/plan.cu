// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "expert_kernels.hpp"
#include "few.cuh"
#include "launch.cuh"
#include "plan_memory.hpp"
#include "splits.hpp"

namespace sida::cuda {
namespace {

constexpr int take_threads = 256;
constexpr int plan_warps = 32;
constexpr int chunk = plan_chunk;
static_assert(chunk == plan_warps * 32);

/// A thread takes one assignment.
__global__ void __launch_bounds__(take_threads)
    take_kernel(LayerShape shape, GivenRouting given, TakenRouting taken) {
  const int a = static_cast<int>(blockIdx.x) * take_threads + static_cast<int>(threadIdx.x);
  if (a < shape.tokens * shape.top_k) take(shape, taken, a, given_assignment(shape, given, a));
}

/// The expert of assignment `a`, or -1 if it is left out; `invalid` is set for an unknown id.
__device__ int expert_at(const std::int32_t* ids, const float* weights, int a, int experts,
                         bool& invalid) {
  return expert_of({ids[a], weights[a]}, experts, invalid);
}

/// Exclusive sums of counts into offsets, and the list of active experts; by one warp.
__device__ void scan(const int* counts, int experts, const Plan& plan, int* next_row) {
  const int lane = static_cast<int>(threadIdx.x);
  int rows_before = 0, active_before = 0;
  for (int first = 0; first < experts; first += 32) {
    const int e = first + lane;
    const int count = e < experts ? counts[e] : 0;
    int sum = count;
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(~0u, sum, distance);
      if (lane >= distance) sum += other;
    }
    const unsigned active = __ballot_sync(~0u, count > 0);
    const int row = rows_before + sum - count;
    if (e < experts) {
      plan.counts[e] = count;
      next_row[e] = row;
      if (count > 0)
        plan.active[active_before + __popc(active & ((1u << lane) - 1))] = {e, row, count, 0};
    }
    rows_before += __shfl_sync(~0u, sum, 31);
    active_before += __popc(active);
  }
  if (lane == 0) *plan.active_count = active_before;
  if (lane < 2) plan.taken_tiles[lane] = 0;
}

/// Places assignments [begin, end) by one block. Rows are placed in the order of assignments: chunk
/// after chunk, in a chunk warp after warp, in a warp lane after lane.
__device__ void place(const std::int32_t* ids, const float* weights, int begin, int end,
                      int experts, const Plan& plan, const int* counts, int* next_row,
                      unsigned short (*in_warp)[max_experts]) {
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32, lane = thread % 32, warps = threads / 32;
  for (int first = begin; first < end; first += threads) {
    __syncthreads();
    const int a = first + thread;
    bool invalid = false;
    const int e = a < end ? expert_at(ids, weights, a, experts, invalid) : -1;
    const unsigned same = __match_any_sync(~0u, e);
    const int rank = __popc(same & ((1u << lane) - 1));
    if (e >= 0 && rank == 0) in_warp[warp][e] = static_cast<unsigned short>(__popc(same));
    __syncthreads();
    int row = e >= 0 ? next_row[e] + rank : -1;
    if (e >= 0)
      for (int w = 0; w < warp; ++w) row += in_warp[w][e];
    if (a < end) {
      plan.row_of[a] = row;
      plan.group_rows[a] = e >= 0 ? counts[e] : 0;
    }
    if (row >= 0) plan.order[row] = a;
    __syncthreads();
    if (first + threads >= end) break;
    for (int other = thread; other < experts; other += threads) {
      int sum = 0;
      for (int w = 0; w < warps; ++w) {
        sum += in_warp[w][other];
        in_warp[w][other] = 0;
      }
      next_row[other] += sum;
    }
  }
}

/// Counts assignments [begin, end) into `counts`, zero before, by one block.
__device__ void count(const std::int32_t* ids, const float* weights, int begin, int end,
                      int experts, int* counts, int* invalid_ids) {
  for (int a = begin + static_cast<int>(threadIdx.x); a < end; a += static_cast<int>(blockDim.x)) {
    bool invalid = false;
    const int e = expert_at(ids, weights, a, experts, invalid);
    if (e >= 0) atomicAdd(&counts[e], 1);
    if (invalid) atomicAdd(invalid_ids, 1);
  }
}

/// One block counts, scans and places.
__global__ void __launch_bounds__(plan_warps * 32)
    plan_kernel(const std::int32_t* ids, const float* weights, int assignments, int experts,
                Plan plan) {
  __shared__ int counts[max_experts];
  __shared__ int next_row[max_experts];
  __shared__ unsigned short in_warp[plan_warps][max_experts];
  __shared__ int invalid_ids;
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  let_next_start();
  for (int e = thread; e < experts; e += threads) {
    counts[e] = 0;
    for (int w = 0; w < threads / 32; ++w) in_warp[w][e] = 0;
  }
  if (thread == 0) invalid_ids = 0;
  __syncthreads();
  count(ids, weights, 0, assignments, experts, counts, &invalid_ids);
  __syncthreads();
  if (thread < 32) scan(counts, experts, plan, next_row);
  if (thread == 0) *plan.invalid = invalid_ids;
  place(ids, weights, 0, assignments, experts, plan, counts, next_row, in_warp);
}

/// A warp takes few assignments and plans them.
__global__ void __launch_bounds__(32)
    few_kernel(LayerShape shape, GivenRouting given, TakenRouting taken, Plan plan) {
  const int a = static_cast<int>(threadIdx.x);
  let_next_start();
  Assignment mine;
  if (a < shape.tokens * shape.top_k) {
    mine = given_assignment(shape, given, a);
    take(shape, taken, a, mine);
  }
  plan_few(shape, mine, plan);
  if (a < 2) plan.taken_tiles[a] = 0;
}

/// Of many assignments, one block counts `chunk`: into plan.chunks [blocks, E + 1], ids out of
/// range last.
__global__ void __launch_bounds__(chunk) count_kernel(const std::int32_t* ids, const float* weights,
                                                      int assignments, int experts, Plan plan) {
  __shared__ int counts[max_experts + 1];
  const int begin = static_cast<int>(blockIdx.x) * chunk;
  for (int e = static_cast<int>(threadIdx.x); e <= experts; e += chunk) counts[e] = 0;
  __syncthreads();
  count(ids, weights, begin, min(begin + chunk, assignments), experts, counts, &counts[experts]);
  __syncthreads();
  std::int32_t* const to = plan.chunks + static_cast<std::size_t>(blockIdx.x) * (experts + 1);
  for (int e = static_cast<int>(threadIdx.x); e <= experts; e += chunk) to[e] = counts[e];
}

/// One block turns the chunks' counts into their first rows.
__global__ void __launch_bounds__(chunk) scan_kernel(int blocks, int experts, Plan plan) {
  __shared__ int counts[max_experts + 1];
  __shared__ int next_row[max_experts + 1];
  const int e = static_cast<int>(threadIdx.x);
  int sum = 0;
  if (e <= experts) {
#pragma unroll 8
    for (int b = 0; b < blocks; ++b)
      sum += plan.chunks[static_cast<std::size_t>(b) * (experts + 1) + e];
    counts[e] = sum;
  }
  __syncthreads();
  if (e < 32) scan(counts, experts, plan, next_row);
  if (e == experts) *plan.invalid = sum;
  __syncthreads();
  if (e >= experts) return;
  int row = next_row[e];
#pragma unroll 8
  for (int b = 0; b < blocks; ++b) {
    std::int32_t& first = plan.chunks[static_cast<std::size_t>(b) * (experts + 1) + e];
    const int rows = first;
    first = row;
    row += rows;
  }
}

/// A block places its chunk.
__global__ void __launch_bounds__(chunk) place_kernel(const std::int32_t* ids, const float* weights,
                                                      int assignments, int experts, Plan plan) {
  __shared__ int next_row[max_experts];
  __shared__ unsigned short in_warp[plan_warps][max_experts];
  const int begin = static_cast<int>(blockIdx.x) * chunk;
  const std::int32_t* from = plan.chunks + static_cast<std::size_t>(blockIdx.x) * (experts + 1);
  for (int e = static_cast<int>(threadIdx.x); e < experts; e += chunk) {
    next_row[e] = from[e];
    for (int w = 0; w < plan_warps; ++w) in_warp[w][e] = 0;
  }
  place(ids, weights, begin, min(begin + chunk, assignments), experts, plan, plan.counts, next_row,
        in_warp);
}

void launch_plan(const std::int32_t* ids, const float* weights, int assignments, int experts,
                 const Plan& plan, cudaStream_t stream) {
  if (assignments <= most_in_one_block) {
    const int threads = assignments <= 256 ? 256 : plan_warps * 32;
    plan_kernel<<<1, threads, 0, stream>>>(ids, weights, assignments, experts, plan);
  } else {
    const int blocks = parts_of(assignments, chunk);
    count_kernel<<<blocks, chunk, 0, stream>>>(ids, weights, assignments, experts, plan);
    scan_kernel<<<1, chunk, 0, stream>>>(blocks, experts, plan);
    place_kernel<<<blocks, chunk, 0, stream>>>(ids, weights, assignments, experts, plan);
  }
}

}  // namespace

void make_plan(const LayerShape& shape, const GivenRouting& given, const TakenRouting& taken,
               const Plan& plan, Stream stream) {
  if (shape.top_k < 1 || shape.top_k > max_top_k)
    throw std::invalid_argument("expert kernels: expected top_k from 1 to " +
                                std::to_string(max_top_k) + ", got " + std::to_string(shape.top_k));
  if (shape.experts < 1 || shape.experts > max_experts)
    throw std::invalid_argument("expert kernels: expected 1 to " + std::to_string(max_experts) +
                                " experts, got " + std::to_string(shape.experts));
  const int assignments = shape.tokens * shape.top_k;
  const bool is_plain = !given.wide_ids && given.weights_type == Dtype::f32 && !given.keep;
  if (assignments > 0 && !taken.ids && !is_plain)
    throw std::invalid_argument(
        "expert kernels: expected memory for the routing, or ids of i32 and weights of f32");
  if (assignments <= few_assignments) {
    few_kernel<<<1, 32, 0, stream>>>(shape, given, taken, plan);
  } else {
    if (taken.ids) {
      const auto blocks = static_cast<unsigned>(parts_of(assignments, take_threads));
      take_kernel<<<blocks, take_threads, 0, stream>>>(shape, given, taken);
    }
    launch_plan(taken.ids ? taken.ids : static_cast<const std::int32_t*>(given.ids),
                taken.ids ? taken.weights : static_cast<const float*>(given.weights), assignments,
                shape.experts, plan, stream);
  }
  check(cudaGetLastError(), "launch the plan of expert rows");
}

}  // namespace sida::cuda
