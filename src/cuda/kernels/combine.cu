// SPDX-License-Identifier: Apache-2.0
#include <type_traits>

#include "choose_kernel.hpp"
#include "combine.cuh"
#include "element.cuh"
#include "expert_kernels.hpp"
#include "launch.cuh"

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
  out[static_cast<std::size_t>(token) * shape.hidden + column] =
      rounded<Element>(sum_of_choices(shape, plan, weights, results, token, column));
}

/// Eight elements of 16 bits.
template <class Element>
union Piece {
  uint4 bits;
  Element values[8];
};

/// A thread sums 8 columns of one token, of results of 16 bits.
template <class Element>
__global__ void __launch_bounds__(combine_threads)
    combine_short_kernel(LayerShape shape, Plan plan, const float* weights, const Element* results,
                         Element* out) {
  wait_for_previous();
  let_next_start();
  const std::size_t index = static_cast<std::size_t>(blockIdx.x) * combine_threads + threadIdx.x;
  const int pieces = shape.hidden / 8;
  const int token = static_cast<int>(index / pieces), piece = static_cast<int>(index % pieces);
  if (token >= shape.tokens) return;
  float sums[8] = {};
#pragma unroll 4
  for (int j = 0; j < shape.top_k; ++j) {
    const int a = token * shape.top_k + j;
    const int row = plan.row_of[a];
    if (row < 0) continue;
    const float weight = weights[a];
    Piece<Element> result;
    result.bits = reinterpret_cast<const uint4*>(results + static_cast<std::size_t>(row) *
                                                               shape.hidden)[piece];
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i] += weight * to_float(result.values[i]);
  }
  Piece<Element> sum;
#pragma unroll
  for (int i = 0; i < 8; ++i) sum.values[i] = rounded<Element>(sums[i]);
  reinterpret_cast<uint4*>(out + static_cast<std::size_t>(token) * shape.hidden)[piece] = sum.bits;
}

template <class Element>
void launch_combine(const LayerShape& shape, const Plan& plan, const float* weights,
                    const std::byte* results, Element* out, cudaStream_t stream) {
  constexpr const char* what = "launch the sum over experts";
  if constexpr (!std::is_same_v<Element, float>)
    if (short_results(shape.kernel)) {
      const std::size_t threads = static_cast<std::size_t>(shape.tokens) * (shape.hidden / 8);
      const auto blocks = static_cast<unsigned>((threads + combine_threads - 1) / combine_threads);
      return launch(what, combine_short_kernel<Element>, dim3(blocks), combine_threads, stream,
                    shape, plan, weights, reinterpret_cast<const Element*>(results), out);
    }
  const dim3 grid(static_cast<unsigned>(shape.tokens),
                  static_cast<unsigned>((shape.hidden + combine_threads - 1) / combine_threads));
  launch(what, combine_kernel<Element>, grid, combine_threads, stream, shape, plan, weights,
         reinterpret_cast<const float*>(results), out);
}

}  // namespace

void combine(const LayerShape& given, const Plan& plan, const float* weights,
             const std::byte* workspace, void* out, Stream stream) {
  if (given.tokens == 0) return;
  const LayerShape shape = with_kernel(given);
  const std::byte* const results = workspace + results_offset(shape);
  with_element(shape.dtype, [&](auto element) {
    using Element = decltype(element);
    launch_combine<Element>(shape, plan, weights, results, static_cast<Element*>(out), stream);
  });
}

}  // namespace sida::cuda
