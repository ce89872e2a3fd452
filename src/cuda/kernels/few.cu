// SPDX-License-Identifier: Apache-2.0
#include "few.cuh"

#include <algorithm>

#include "choose_kernel.hpp"
#include "combine.cuh"
#include "launch.cuh"
#include "streaming.cuh"

namespace sida::cuda {
namespace {

/// Blocks of a multiprocessor, all of them there at once: each plans the call for itself, which is
/// sooner done than waiting for a kernel that does, and works on one part after the other. Measured
/// on an H100 with 2, 3 and 4, at 1 to 4 tokens of Switch-base-128's and Qwen3-30B's shapes.
constexpr int blocks_each = 3;
/// Columns whose results the last block to end sums.
constexpr int down_columns = stripe_outputs<Phase::down>;
/// Parts of a block, at most.
constexpr int most_parts = 64;

template <class Element, Phase phase>
__global__ void __launch_bounds__(streaming_threads, blocks_each)
    few_up_kernel(Product product, GivenRouting given, TakenRouting taken,
                  const __grid_constant__ FewSlots slots) {
  __shared__ FewPlan few;
  wait_for_previous();
  product.plan = few.make(product.shape, given, taken, blockIdx.x == 0);
  const int wide = parts_of(product.shape.intermediate, stripe_outputs<phase>);
  const int parts = few.active_count * wide;
  for (int i = static_cast<int>(blockIdx.x); i < parts; i += static_cast<int>(gridDim.x))
    stream_product<Element, phase, 1, 1>(product, {i / wide, i % wide, 0}, slots);
}

/// Of the blocks that share 16 columns, the last one to end sums over choices.
template <class Element>
__global__ void __launch_bounds__(streaming_threads, blocks_each)
    few_down_kernel(Product product, GivenRouting given, unsigned* ended, Element* out,
                    const __grid_constant__ FewSlots slots) {
  __shared__ FewPlan few;
  __shared__ int last[most_parts], last_count;
  const LayerShape& shape = product.shape;
  const int thread = static_cast<int>(threadIdx.x), blocks = static_cast<int>(gridDim.x);
  if (thread == 0) last_count = 0;
  product.plan = few.make(shape, given, {}, false);
  const int wide = parts_of(shape.hidden, down_columns);
  const int splits = down_splits(shape, 1);
  const int depth = max(few.active_count * splits, 1);  // one part that does nothing, of no expert
  const int parts = wide * depth, first = static_cast<int>(blockIdx.x);
  for (int i = first; i < parts; i += blocks)
    stream_product<Element, Phase::down, 1, 1>(
        product, {i / wide / splits, i % wide, i / wide % splits}, slots);
  __threadfence();
  __syncthreads();
  for (int i = first + thread * blocks; i < parts; i += streaming_threads * blocks)
    if (atomicAdd(&ended[i % wide], 1u) == static_cast<unsigned>(depth - 1)) {
      ended[i % wide] = 0;
      last[atomicAdd(&last_count, 1)] = i % wide;
    }
  __syncthreads();
  __threadfence();
  const int columns = shape.tokens * down_columns;
  for (int i = thread; i < last_count * columns; i += streaming_threads) {
    const int token = i % columns / down_columns;
    const int column = last[i / columns] * down_columns + i % down_columns;
    if (column < shape.hidden)
      out[static_cast<std::size_t>(token) * shape.hidden + column] =
          rounded<Element>(sum_of_choices(shape, product.plan, few.weights,
                                          static_cast<const float*>(product.out), token, column));
  }
}

/// Blocks for so many parts, as far as they are there at once.
dim3 grid_of(int parts) {
  const int multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount);
  const int fewest = parts_of(parts, most_parts);
  return dim3(
      static_cast<unsigned>(std::max(std::min(parts, blocks_each * multiprocessors), fewest)));
}

template <class Element>
void launch_few(const LayerShape& shape, const GivenRouting& given, const TakenRouting& taken,
                const void* hidden, const ExpertSlabs& slabs, std::byte* workspace,
                std::byte* counters, void* out, cudaStream_t stream, const FewSlots& slots) {
  constexpr const char* what = "launch a call of few rows";
  const Product up{shape, {}, slabs, hidden, workspace};
  const Product down{shape, {}, slabs, workspace, workspace + results_offset(shape)};
  const int experts = std::min(shape.experts, shape.tokens * shape.top_k);
  if (shape.gated)
    launch(what, few_up_kernel<Element, Phase::gated_up>,
           grid_of(parts_of(shape.intermediate, stripe_outputs<Phase::gated_up>) * experts),
           streaming_threads, stream, up, given, taken, slots);
  else
    launch(what, few_up_kernel<Element, Phase::up>,
           grid_of(parts_of(shape.intermediate, stripe_outputs<Phase::up>) * experts),
           streaming_threads, stream, up, given, taken, slots);
  launch(what, few_down_kernel<Element>,
         grid_of(parts_of(shape.hidden, down_columns) * experts * down_splits(shape, 1)),
         streaming_threads, stream, down, given, reinterpret_cast<unsigned*>(counters),
         static_cast<Element*>(out), slots);
}

}  // namespace

bool is_few(const LayerShape& shape) {
  const int assignments = shape.tokens * shape.top_k;
  return 0 < assignments && assignments <= few_assignments &&
         with_kernel(shape).kernel == Kernel::narrow;
}

std::size_t few_bytes(const LayerShape& shape) {
  return static_cast<std::size_t>(parts_of(shape.hidden, down_columns)) * sizeof(unsigned);
}

void compute_few(const LayerShape& given_shape, const GivenRouting& given,
                 const TakenRouting& taken, const void* hidden, const ExpertSlabs& slabs,
                 std::byte* workspace, std::byte* counters, void* out, Stream stream,
                 const FewSlots& slots) {
  const LayerShape shape = with_kernel(given_shape);
  const TakenRouting told{nullptr, nullptr, taken.host_ids, taken.host_weights};
  if (shape.dtype == Dtype::f16)
    launch_few<__half>(shape, given, told, hidden, slabs, workspace, counters, out, stream, slots);
  else
    launch_few<__nv_bfloat16>(shape, given, told, hidden, slabs, workspace, counters, out, stream,
                              slots);
}

}  // namespace sida::cuda
