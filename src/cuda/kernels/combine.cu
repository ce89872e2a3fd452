// SPDX-License-Identifier: Apache-2.0
#include "element.cuh"
#include "expert_kernels.hpp"
#include "launch.cuh"
#include "splits.hpp"

namespace sida::cuda {
namespace {

constexpr int combine_threads = 256;

/// A block sums 256 columns of one token.
template <class Element>
__global__ void __launch_bounds__(combine_threads)
    combine_kernel(LayerShape shape, Plan plan, const float* weights, const float* results,
                   Element* out) {
  wait_for_previous();
  let_next_start();
  const int token = static_cast<int>(blockIdx.x);
  const int column = static_cast<int>(blockIdx.y) * combine_threads + static_cast<int>(threadIdx.x);
  if (column >= shape.hidden) return;
  const std::size_t hidden = static_cast<std::size_t>(shape.hidden);
  const std::size_t part = static_cast<std::size_t>(shape.tokens) * shape.top_k * hidden;
  float sum = 0.0f;
  for (int j = 0; j < shape.top_k; ++j) {
    const int a = token * shape.top_k + j;
    const int row = plan.row_of[a];
    if (row < 0) continue;
    const int splits = down_splits(shape, plan.group_rows[a]);
    const float* result = results + static_cast<std::size_t>(row) * hidden + column;
    float value = *result;
    for (int s = 1; s < splits; ++s) value += result[s * part];
    sum += weights[a] * value;
  }
  out[static_cast<std::size_t>(token) * hidden + column] = rounded<Element>(sum);
}

}  // namespace

void combine(const LayerShape& shape, const Plan& plan, const float* weights,
             const std::byte* workspace, void* out, Stream stream) {
  if (shape.tokens == 0) return;
  const auto* results = reinterpret_cast<const float*>(workspace + results_offset(shape));
  const dim3 grid(static_cast<unsigned>(shape.tokens),
                  static_cast<unsigned>((shape.hidden + combine_threads - 1) / combine_threads));
  with_element(shape.dtype, [&](auto element) {
    using Element = decltype(element);
    launch("launch the sum over experts", combine_kernel<Element>, grid, combine_threads, stream,
           shape, plan, weights, results, static_cast<Element*>(out));
  });
}

}  // namespace sida::cuda
