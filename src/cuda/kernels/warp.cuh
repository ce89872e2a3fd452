// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

namespace sida::cuda {

constexpr unsigned whole_warp = 0xffffffffu;

/// Sums each of `Count` values over the lanes of a warp, in an order that depends on nothing else.
/// @returns value number lane / (32 / Count).
template <int Count, int Offset = 16, int Size>
__device__ inline float sum_each(float (&values)[Size], int lane) {
  if constexpr (Count > 1) {
    const bool upper = (lane & Offset) != 0;
#pragma unroll
    for (int i = 0; i < Count / 2; ++i) {
      const float kept = upper ? values[i + Count / 2] : values[i];
      const float given = upper ? values[i] : values[i + Count / 2];
      values[i] = kept + __shfl_xor_sync(whole_warp, given, Offset);
    }
    return sum_each<Count / 2, Offset / 2>(values, lane);
  } else {
    float sum = values[0];
#pragma unroll
    for (int offset = Offset; offset >= 1; offset /= 2)
      sum += __shfl_xor_sync(whole_warp, sum, offset);
    return sum;
  }
}

template <class T>
__device__ inline T warp_sum(T value) {
#pragma unroll
  for (int offset = 16; offset >= 1; offset /= 2)
    value += __shfl_xor_sync(whole_warp, value, offset);
  return value;
}

__device__ inline float warp_max(float value) {
#pragma unroll
  for (int offset = 16; offset >= 1; offset /= 2)
    value = fmaxf(value, __shfl_xor_sync(whole_warp, value, offset));
  return value;
}

}  // namespace sida::cuda
