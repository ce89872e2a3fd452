// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "expert_kernels.hpp"

#ifdef __CUDACC__
#define SIDA_HOST_DEVICE __host__ __device__
#else
#define SIDA_HOST_DEVICE
#endif

namespace sida::cuda {

/// Elements of the contracted dimension that a warp multiplies at once.
constexpr int k_step = 32;
/// Warps of a block; they share the contracted dimension.
constexpr int block_warps = 8;
/// Rows of an expert up to which its down product is split over blocks.
constexpr int split_rows = 8;

/// Of how many parts of `each` a count is, the last of them perhaps smaller.
SIDA_HOST_DEVICE constexpr int parts_of(int count, int each) { return (count + each - 1) / each; }

/// Whether the kernels that stream 16-bit weights 16 bytes at a time take this shape: rows of
/// weights must begin at multiples of 16 bytes.
SIDA_HOST_DEVICE constexpr bool streams_weights(Dtype dtype, int hidden, int intermediate) {
  return dtype != Dtype::f32 && hidden % 8 == 0 && intermediate % 8 == 0;
}

/// Into how many parts, each summed alone and added in order, the contracted dimension of the down
/// product is cut for an expert with `rows` rows in the whole call: few rows still reach most
/// multiprocessors, while each warp keeps three steps or more. `shape` is of with_kernel().
SIDA_HOST_DEVICE constexpr int down_splits(const LayerShape& shape, int rows) {
  const bool splits_rows = shape.kernel == Kernel::narrow || shape.kernel == Kernel::wide;
  if (rows > split_rows || !splits_rows) return 1;
  const int stripes = (shape.hidden + 15) / 16;
  const int wanted = (192 + stripes - 1) / stripes;
  const int possible = shape.intermediate / (k_step * block_warps * 3);
  const int splits = wanted < possible ? wanted : possible;
  return splits < 1 ? 1 : splits > 8 ? 8 : splits;
}

/// Whether the rows' results are kept in the dtype, not f32.
constexpr bool short_results(Kernel kernel) {
  return kernel == Kernel::grouped || kernel == Kernel::swapped || kernel == Kernel::hopper;
}

/// Where in a call's scratch memory the rows' results begin: it holds activations [T * k, I] of the
/// dtype, then results [splits, T * k, H] in f32 (where short_results(), [T * k, H] of the dtype),
/// both by row of the plan.
constexpr std::size_t results_offset(const LayerShape& shape) {
  const std::size_t element = shape.dtype == Dtype::f32 ? 4 : 2;
  const std::size_t bytes = static_cast<std::size_t>(shape.tokens) *
                            static_cast<std::size_t>(shape.top_k) *
                            static_cast<std::size_t>(shape.intermediate) * element;
  return (bytes + 15) / 16 * 16;
}

}  // namespace sida::cuda
