// SPDX-License-Identifier: Apache-2.0
#include "few.cuh"

#include "choose_kernel.hpp"
#include "combine.cuh"
#include "launch.cuh"
#include "streaming.cuh"

namespace sida::cuda {
namespace {

/// Each block plans the call for itself, rather than waiting for a kernel that does.
template <class Element, Phase phase>
__global__ void __launch_bounds__(streaming_threads)
    few_up_kernel(Product product, GivenRouting given, TakenRouting taken) {
  __shared__ FewPlan few;
  wait_for_previous();
  const bool tells = blockIdx.x == 0 && blockIdx.y == 0;
  product.plan = few.make(product.shape, given, taken, tells);
  stream_product<Element, phase, 1, 1>(product);
}

/// Of the blocks that share 16 columns, the last one to end sums over choices.
template <class Element>
__global__ void __launch_bounds__(streaming_threads)
    few_down_kernel(Product product, GivenRouting given, unsigned* ended, Element* out) {
  __shared__ FewPlan few;
  __shared__ bool is_last;
  product.plan = few.make(product.shape, given, {}, false);
  stream_product<Element, Phase::down, 1, 1>(product);
  __threadfence();
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) is_last = atomicAdd(&ended[blockIdx.x], 1u) == gridDim.y * gridDim.z - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  if (thread == 0) ended[blockIdx.x] = 0;
  const LayerShape& shape = product.shape;
  for (int i = thread; i < shape.tokens * down_columns; i += streaming_threads) {
    const int token = i / down_columns;
    const int column = static_cast<int>(blockIdx.x) * down_columns + i % down_columns;
    if (column < shape.hidden)
      out[static_cast<std::size_t>(token) * shape.hidden + column] =
          rounded<Element>(sum_of_choices(shape, product.plan, few.weights,
                                          static_cast<const float*>(product.out), token, column));
  }
}

unsigned blocks(int count, int each) { return static_cast<unsigned>((count + each - 1) / each); }

template <class Element>
void launch_few(const LayerShape& shape, const GivenRouting& given, const TakenRouting& taken,
                const void* hidden, const ExpertSlabs& slabs, std::byte* workspace,
                std::byte* counters, void* out, cudaStream_t stream) {
  constexpr const char* what = "launch a call of few rows";
  const Product up{shape, {}, slabs, hidden, workspace};
  const Product down{shape, {}, slabs, workspace, workspace + results_offset(shape)};
  const auto experts = static_cast<unsigned>(std::min(shape.experts, shape.tokens * shape.top_k));
  if (shape.gated)
    launch(what, few_up_kernel<Element, Phase::gated_up>,
           dim3(blocks(shape.intermediate, 8), experts), streaming_threads, stream, up, given,
           taken);
  else
    launch(what, few_up_kernel<Element, Phase::up>, dim3(blocks(shape.intermediate, 16), experts),
           streaming_threads, stream, up, given, taken);
  const auto splits = static_cast<unsigned>(down_splits(shape, 1));
  launch(what, few_down_kernel<Element>, dim3(blocks(shape.hidden, down_columns), experts, splits),
         streaming_threads, stream, down, given, reinterpret_cast<unsigned*>(counters),
         static_cast<Element*>(out));
}

}  // namespace

bool is_few(const LayerShape& shape) {
  const int assignments = shape.tokens * shape.top_k;
  return 0 < assignments && assignments <= few_assignments &&
         with_kernel(shape).kernel == Kernel::narrow;
}

std::size_t few_bytes(const LayerShape& shape) {
  return blocks(shape.hidden, down_columns) * sizeof(unsigned);
}

void compute_few(const LayerShape& given_shape, const GivenRouting& given,
                 const TakenRouting& taken, const void* hidden, const ExpertSlabs& slabs,
                 std::byte* workspace, std::byte* counters, void* out, Stream stream) {
  const LayerShape shape = with_kernel(given_shape);
  const TakenRouting told{nullptr, nullptr, taken.host_ids, taken.host_weights};
  if (shape.dtype == Dtype::f16)
    launch_few<__half>(shape, given, told, hidden, slabs, workspace, counters, out, stream);
  else
    launch_few<__nv_bfloat16>(shape, given, told, hidden, slabs, workspace, counters, out, stream);
}

}  // namespace sida::cuda
