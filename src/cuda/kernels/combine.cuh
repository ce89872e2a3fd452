// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "expert_kernels.hpp"
#include "splits.hpp"

namespace sida::cuda {

/// Column `column` of token `token`: the results of its choices, f32, times their weights, in the
/// order of choices. Results come from L2: other blocks of the same kernel may have written them.
__device__ inline float sum_of_choices(const LayerShape& shape, const Plan& plan,
                                       const float* weights, const float* results, int token,
                                       int column) {
  const std::size_t hidden = static_cast<std::size_t>(shape.hidden);
  const std::size_t part = static_cast<std::size_t>(shape.tokens) * shape.top_k * hidden;
  float sum = 0.0f;
  for (int j = 0; j < shape.top_k; ++j) {
    const int a = token * shape.top_k + j;
    const int row = plan.row_of[a];
    if (row < 0) continue;
    const int splits = down_splits(shape, plan.group_rows[a]);
    const float* result = results + static_cast<std::size_t>(row) * hidden + column;
    float value = __ldcg(result);
    for (int s = 1; s < splits; ++s) value += __ldcg(result + s * part);
    sum += weights[a] * value;
  }
  return sum;
}

}  // namespace sida::cuda
