// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "expert_kernels.hpp"

namespace sida::cuda {

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

/// `value` rounded to Element, to nearest even.
template <class Element>
__device__ Element rounded(float value);
template <>
__device__ inline float rounded<float>(float value) {
  return value;
}
template <>
__device__ inline __half rounded<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 rounded<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

/// x cut at `limit` from above; a NaN stays one.
__device__ inline float at_most(float x, float limit) { return x > limit ? limit : x; }

__device__ inline float activated(Act activation, float x, float limit) {
  switch (activation) {
    case Act::relu:
      return x < 0.0f ? 0.0f : x;  // a NaN stays one
    case Act::relu2:
      return x < 0.0f ? 0.0f : x * x;
    case Act::gelu:
      return 0.5f * x * erfcf(-0.70710678f * x);
    case Act::gelu_tanh:
      return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    case Act::silu:
      return x / (1.0f + expf(-x));
    case Act::silu_clamped:
      x = at_most(x, limit);
      return x / (1.0f + expf(-x));
    case Act::swiglu_clamped:
      x = at_most(x, limit);
      return x / (1.0f + expf(-swiglu_alpha * x));
  }
  return x;
}

/// What an activated gate is multiplied by, of the product beside the gate.
__device__ inline float beside_gate(Act activation, float up, float limit) {
  if (activation != Act::silu_clamped && activation != Act::swiglu_clamped) return up;
  up = up < -limit ? -limit : at_most(up, limit);
  return activation == Act::swiglu_clamped ? up + 1.0f : up;
}

/// Calls `function` with a value of the dtype's element type.
template <class Function>
void with_element(Dtype dtype, Function&& function) {
  if (dtype == Dtype::f32) return function(float{});
  if (dtype == Dtype::f16) return function(__half{});
  function(__nv_bfloat16{});
}

}  // namespace sida::cuda
