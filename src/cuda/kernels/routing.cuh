// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "element.cuh"
#include "expert_kernels.hpp"

namespace sida::cuda {

/// One choice of one token, in the form in which the kernels have it.
struct Assignment {
  std::int32_t id = 0;
  float weight = 0.0f;
};

__device__ inline std::int32_t narrowed(std::int64_t id) {
  constexpr std::int64_t most = 0x7fffffff;
  return static_cast<std::int32_t>(id < -most ? -most : id > most ? most : id);
}

/// Assignment `a` of a call, of weight 0 where its token is left out.
__device__ inline Assignment given_assignment(const LayerShape& shape, const GivenRouting& given,
                                              int a) {
  Assignment mine;
  mine.id = given.wide_ids ? narrowed(static_cast<const std::int64_t*>(given.ids)[a])
                           : narrowed(static_cast<const std::int32_t*>(given.ids)[a]);
  if (given.keep != nullptr && given.keep[a / shape.top_k] == 0) return mine;
  switch (given.weights_type) {
    case Dtype::f32:
      mine.weight = static_cast<const float*>(given.weights)[a];
      break;
    case Dtype::f16:
      mine.weight = to_float(static_cast<const __half*>(given.weights)[a]);
      break;
    case Dtype::bf16:
      mine.weight = to_float(static_cast<const __nv_bfloat16*>(given.weights)[a]);
      break;
  }
  return mine;
}

/// Writes assignment `a` for the kernels that follow and for the host, where they are to have it.
__device__ inline void take(const LayerShape& shape, const TakenRouting& taken, int a,
                            const Assignment& mine) {
  if (taken.ids != nullptr) {
    taken.ids[a] = mine.id;
    taken.weights[a] = mine.weight;
  }
  if (taken.host_ids == nullptr) return;
  const bool is_left_out = mine.weight == 0.0f || mine.id == shape.experts;
  taken.host_ids[a] = is_left_out ? left_out : mine.id;
  taken.host_weights[a] = is_left_out ? 0.0f : mine.weight;
}

/// The expert of an assignment, or -1 if it is left out; `invalid` is set for an unknown id.
__device__ inline int expert_of(const Assignment& mine, int experts, bool& invalid) {
  if (mine.weight == 0.0f) return -1;
  if (mine.id >= 0 && mine.id < experts) return mine.id;
  invalid |= mine.id != experts;
  return -1;
}

}  // namespace sida::cuda
