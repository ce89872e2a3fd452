// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "product.cuh"

/// Activations of many outputs at once, for results of 16 bits. They are chosen outside the loop.
namespace sida::cuda {

/// x * sigmoid(at), to f32's accuracy less three bits.
__device__ inline float gated_by_sigmoid(float x, float at) {
  return __fdividef(x, 1.0f + __expf(-at));
}

template <Act activation>
__device__ float quickly_activated(float x) {
  if constexpr (activation == Act::silu) return gated_by_sigmoid(x, x);
  if constexpr (activation == Act::gelu_tanh)
    return gated_by_sigmoid(x, 1.59576912f * (x + 0.044715f * x * x * x));
  if constexpr (activation == Act::swiglu_clamped) {
    x = x > swiglu_limit ? swiglu_limit : x;
    return gated_by_sigmoid(x, swiglu_alpha * x);
  }
  return activated(activation, x);
}

template <class Element>
struct Pair;
template <>
struct Pair<__half> {
  __device__ static __half2 of(float x, float y) { return __floats2half2_rn(x, y); }
};
template <>
struct Pair<__nv_bfloat16> {
  __device__ static __nv_bfloat162 of(float x, float y) { return __floats2bfloat162_rn(x, y); }
};

/// Finishes what a lane of mma or wgmma holds: outputs `column` + 8 p + {0, 1}, for p < pairs, of
/// the expert's rows `row` and `row` + 8. `sum(half, p, i)` and `up(half, p, i)` are the products.
template <class Task, class Element, int pairs, Act activation, class Sum, class Up>
__device__ void finish_activated(const Task& task, int row, int column, Sum&& sum, Up&& up) {
  const int outputs = task.outputs();
  auto* const out = static_cast<Element*>(task.product.out);
#pragma unroll
  for (int p = 0; p < pairs; ++p) {
    const int at = column + 8 * p;
    if (at >= outputs) return;
    const float bias[2] = {task.bias(at), task.bias(at + 1)};
    float up_bias[2] = {};
    if constexpr (Task::gated) {
      up_bias[0] = task.bias(outputs + at);
      up_bias[1] = task.bias(outputs + at + 1);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (row + 8 * half >= task.expert.rows) continue;
      float values[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        values[i] = sum(half, p, i) + bias[i];
        if constexpr (!Task::down) values[i] = quickly_activated<activation>(values[i]);
        if constexpr (Task::gated)
          values[i] *= beside_gate(activation, up(half, p, i) + up_bias[i]);
      }
      const std::size_t sorted = static_cast<std::size_t>(task.expert.row_begin + row + 8 * half);
      const auto pair = Pair<Element>::of(values[0], values[1]);
      *reinterpret_cast<decltype(Pair<Element>::of(0, 0))*>(out + sorted * outputs + at) = pair;
    }
  }
}

/// The same with the layer's activation.
template <class Task, class Element, int pairs, class Sum, class Up>
__device__ void finish_pairs(const Task& task, int row, int column, Sum&& sum, Up&& up) {
  const Act activation = Task::down ? Act::relu : task.product.shape.activation;
  if constexpr (!Task::down) {
    if (activation == Act::gelu)
      return finish_activated<Task, Element, pairs, Act::gelu>(task, row, column, sum, up);
    if (activation == Act::gelu_tanh)
      return finish_activated<Task, Element, pairs, Act::gelu_tanh>(task, row, column, sum, up);
    if (activation == Act::silu)
      return finish_activated<Task, Element, pairs, Act::silu>(task, row, column, sum, up);
    if (activation == Act::swiglu_clamped)
      return finish_activated<Task, Element, pairs, Act::swiglu_clamped>(task, row, column, sum,
                                                                         up);
  }
  finish_activated<Task, Element, pairs, Act::relu>(task, row, column, sum, up);
}

}  // namespace sida::cuda
