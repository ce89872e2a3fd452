// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "expert_kernels.hpp"
#include "launch.cuh"

namespace sida::cuda {
namespace {

constexpr int plan_warps = 32;
/// Assignments that one block plans alone, and that one of several takes.
constexpr int one_block = 2048, chunk = plan_warps * 32;

/// The expert of assignment `a`, or -1 if it is left out; `invalid` is set for an unknown id.
template <class Id>
__device__ int expert_of(const Id* ids, const float* weights, int a, int experts, bool& invalid) {
  if (weights[a] == 0.0f) return -1;
  const Id id = ids[a];
  if (id >= 0 && id < static_cast<Id>(experts)) return static_cast<int>(id);
  invalid |= id != static_cast<Id>(experts);
  return -1;
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
      plan.offsets[e] = next_row[e] = row;
      if (count > 0)
        plan.active[active_before + __popc(active & ((1u << lane) - 1))] = {e, row, count, 0};
    }
    rows_before += __shfl_sync(~0u, sum, 31);
    active_before += __popc(active);
  }
  if (lane == 0) {
    plan.offsets[experts] = rows_before;
    *plan.active_count = active_before;
  }
}

/// Places assignments [begin, end) by one block. Rows are placed in the order of assignments: chunk
/// after chunk, in a chunk warp after warp, in a warp lane after lane.
template <class Id>
__device__ void place(const Id* ids, const float* weights, int begin, int end, int experts,
                      const Plan& plan, const int* counts, int* next_row,
                      unsigned short (*in_warp)[max_experts]) {
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32, lane = thread % 32, warps = threads / 32;
  for (int first = begin; first < end; first += threads) {
    __syncthreads();
    const int a = first + thread;
    bool invalid = false;
    const int e = a < end ? expert_of(ids, weights, a, experts, invalid) : -1;
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
template <class Id>
__device__ void count(const Id* ids, const float* weights, int begin, int end, int experts,
                      int* counts, int* invalid_ids) {
  for (int a = begin + static_cast<int>(threadIdx.x); a < end; a += static_cast<int>(blockDim.x)) {
    bool invalid = false;
    const int e = expert_of(ids, weights, a, experts, invalid);
    if (e >= 0) atomicAdd(&counts[e], 1);
    if (invalid) atomicAdd(invalid_ids, 1);
  }
}

/// One block counts, scans and places.
template <class Id>
__global__ void __launch_bounds__(plan_warps * 32)
    plan_kernel(const Id* ids, const float* weights, int assignments, int experts, Plan plan) {
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

/// Of few assignments, each a lane of the first warp, one block makes the plan without counting.
template <class Id>
__global__ void __launch_bounds__(max_experts)
    few_kernel(const Id* ids, const float* weights, int assignments, int experts, Plan plan) {
  __shared__ int expert_of_lane[32];
  const int thread = static_cast<int>(threadIdx.x);
  let_next_start();
  if (thread < 32) {
    bool invalid = false;
    const int e = thread < assignments ? expert_of(ids, weights, thread, experts, invalid) : -1;
    const unsigned unknown = __ballot_sync(~0u, invalid), same = __match_any_sync(~0u, e);
    const unsigned before = same & ((1u << thread) - 1);
    const unsigned firsts = __ballot_sync(~0u, e >= 0 && before == 0);
    int row = 0, index = 0;
    for (int lane = 0; lane < 32; ++lane) {
      const int other = __shfl_sync(~0u, e, lane);
      if (other < 0 || other >= e) continue;
      ++row;
      index += firsts >> lane & 1;
    }
    const int rows = e >= 0 ? __popc(same) : 0;
    if (firsts >> thread & 1) plan.active[index] = {e, row, rows, 0};
    row = e >= 0 ? row + __popc(before) : -1;
    if (thread < assignments) {
      plan.row_of[thread] = row;
      plan.group_rows[thread] = rows;
    }
    if (row >= 0) plan.order[row] = thread;
    if (thread == 0) {
      *plan.invalid = __popc(unknown);
      *plan.active_count = __popc(firsts);
    }
    expert_of_lane[thread] = e;
  }
  __syncthreads();
  for (int e = thread; e <= experts; e += static_cast<int>(blockDim.x)) {
    int rows = 0, before = 0;
    for (int lane = 0; lane < 32; ++lane) {
      const int other = expert_of_lane[lane];
      rows += other == e;
      before += other >= 0 && other < e;
    }
    if (e < experts) plan.counts[e] = rows;
    plan.offsets[e] = before;
  }
}

/// Of many assignments, one block counts `chunk`: into plan.chunks [blocks, E + 1], ids out of
/// range last.
template <class Id>
__global__ void __launch_bounds__(chunk)
    count_kernel(const Id* ids, const float* weights, int assignments, int experts, Plan plan) {
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
template <class Id>
__global__ void __launch_bounds__(chunk)
    place_kernel(const Id* ids, const float* weights, int assignments, int experts, Plan plan) {
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

template <class Id>
void launch_plan(const Id* ids, const float* weights, int assignments, int experts,
                 const Plan& plan, cudaStream_t stream) {
  if (assignments <= 32) {
    const int threads = std::min(max_experts, (experts + 32) / 32 * 32);
    few_kernel<<<1, threads, 0, stream>>>(ids, weights, assignments, experts, plan);
  } else if (assignments <= one_block) {
    const int threads = assignments <= 256 ? 256 : plan_warps * 32;
    plan_kernel<<<1, threads, 0, stream>>>(ids, weights, assignments, experts, plan);
  } else {
    const int blocks = (assignments + chunk - 1) / chunk;
    count_kernel<<<blocks, chunk, 0, stream>>>(ids, weights, assignments, experts, plan);
    scan_kernel<<<1, chunk, 0, stream>>>(blocks, experts, plan);
    place_kernel<<<blocks, chunk, 0, stream>>>(ids, weights, assignments, experts, plan);
  }
  check(cudaGetLastError(), "launch the plan of expert rows");
}

std::size_t aligned(std::size_t bytes) { return (bytes + 15) / 16 * 16; }

int assignments_of(const LayerShape& shape) { return shape.tokens * shape.top_k; }

std::size_t chunk_counts(const LayerShape& shape) {
  const int assignments = assignments_of(shape);
  if (assignments <= one_block) return 0;
  return static_cast<std::size_t>((assignments + chunk - 1) / chunk) *
         static_cast<std::size_t>(shape.experts + 1);
}

}  // namespace

Plan plan_at(const LayerShape& shape, std::byte* memory) {
  const auto assignments = static_cast<std::size_t>(assignments_of(shape));
  const auto experts = static_cast<std::size_t>(shape.experts);
  const auto take = [&memory](std::size_t count) {
    auto* part = reinterpret_cast<std::int32_t*>(memory);
    memory += aligned(count * sizeof(std::int32_t));
    return part;
  };
  Plan plan{};
  plan.active = reinterpret_cast<ActiveExpert*>(take(4 * experts));
  plan.active_count = take(1);
  plan.counts = take(experts + 1);
  plan.invalid = plan.counts + experts;
  plan.offsets = take(experts + 1);
  plan.order = take(assignments);
  plan.row_of = take(assignments);
  plan.group_rows = take(assignments);
  plan.chunks = take(chunk_counts(shape));
  return plan;
}

std::size_t plan_bytes(const LayerShape& shape) {
  const auto assignments = static_cast<std::size_t>(assignments_of(shape));
  const auto experts = static_cast<std::size_t>(shape.experts);
  return aligned(16 * experts) + aligned(4) + 2 * aligned(4 * experts + 4) +
         3 * aligned(4 * assignments) + aligned(4 * chunk_counts(shape));
}

void make_plan(const LayerShape& shape, const void* ids, bool wide_ids, const float* weights,
               const Plan& plan, Stream stream) {
  if (shape.top_k < 1 || shape.top_k > max_top_k)
    throw std::invalid_argument("expert kernels: expected top_k from 1 to " +
                                std::to_string(max_top_k) + ", got " + std::to_string(shape.top_k));
  if (shape.experts < 1 || shape.experts > max_experts)
    throw std::invalid_argument("expert kernels: expected 1 to " + std::to_string(max_experts) +
                                " experts, got " + std::to_string(shape.experts));
  const int assignments = assignments_of(shape);
  if (wide_ids)
    launch_plan(static_cast<const std::int64_t*>(ids), weights, assignments, shape.experts, plan,
                stream);
  else
    launch_plan(static_cast<const std::int32_t*>(ids), weights, assignments, shape.experts, plan,
                stream);
}

}  // namespace sida::cuda
