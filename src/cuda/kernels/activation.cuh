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
__device__ float quickly_activated(float x, float limit) {
  if constexpr (activation == Act::silu) return gated_by_sigmoid(x, x);
  if constexpr (activation == Act::gelu_tanh)
    return gated_by_sigmoid(x, 1.59576912f * (x + 0.044715f * x * x * x));
  if constexpr (activation == Act::silu_clamped) {
    x = at_most(x, limit);
    return gated_by_sigmoid(x, x);
  }
  if constexpr (activation == Act::swiglu_clamped) {
    x = at_most(x, limit);
    return gated_by_sigmoid(x, swiglu_alpha * x);
  }
  return activated(activation, x, limit);
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

template <Act activation>
struct Chosen {
  static constexpr Act value = activation;
};

/// An output: `sum` is the weights' (with a gate: the gate's) product with its bias, `up` that
/// beside the gate.
template <class Task, Act activation>
__device__ float finished(float sum, float up, float limit) {
  if constexpr (Task::down) return sum;
  sum = quickly_activated<activation>(sum, limit);
  if constexpr (Task::gated) sum *= beside_gate(activation, up, limit);
  return sum;
}

/// Finishes outputs `at` and `at` + 1 of an expert's row, as one word.
template <class Task, class Element, Act activation>
__device__ unsigned finished_pair(const Task& task, int at, const float (&sums)[2],
                                  const float (&ups)[2]) {
  const float limit = task.product.shape.limit;
  float values[2];
#pragma unroll
  for (int i = 0; i < 2; ++i)
    values[i] = finished<Task, activation>(
        sums[i] + task.bias(at + i),
        Task::gated ? ups[i] + task.bias(task.outputs() + at + i) : 0.0f, limit);
  const auto pair = Pair<Element>::of(values[0], values[1]);
  return *reinterpret_cast<const unsigned*>(&pair);
}

/// Lane q of four gets word q of each of the four.
__device__ inline void transpose(unsigned (&words)[4], int quarter) {
  const bool odd = quarter & 1, high = quarter & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const unsigned other = __shfl_xor_sync(~0u, odd ? words[i] : words[i + 1], 1);
    (odd ? words[i] : words[i + 1]) = other;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const unsigned other = __shfl_xor_sync(~0u, high ? words[i] : words[i + 2], 2);
    (high ? words[i] : words[i + 2]) = other;
  }
}

/// Finishes what a lane of mma or wgmma holds: outputs `column` + 2 (lane % 4) + 8 p + {0, 1}, for
/// p < pairs, of the expert's rows `row` and `row` + 8. `sum(half, p, i)` and `up(half, p, i)` are
/// the products. Called by whole warps; four lanes together write 64 bytes of a row.
template <class Task, class Element, int pairs, Act activation, class Sum, class Up>
__device__ void finish_activated(const Task& task, int row, int column, Sum&& sum, Up&& up) {
  constexpr int each = pairs < 4 ? pairs : 4;
  const int outputs = task.outputs(), quarter = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int group = 0; group < pairs; group += each) {
    const int first = column + 8 * group;
    if (first >= outputs) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      unsigned words[4] = {};
#pragma unroll
      for (int p = 0; p < each; ++p) {
        const int at = first + 8 * p + 2 * quarter;
        const float sums[2] = {sum(half, group + p, 0), sum(half, group + p, 1)};
        const float ups[2] = {up(half, group + p, 0), up(half, group + p, 1)};
        if (at < outputs) words[p] = finished_pair<Task, Element, activation>(task, at, sums, ups);
      }
      transpose(words, quarter);
      const int at = first + 8 * quarter;
      if (quarter >= each || at >= outputs || row + 8 * half >= task.expert.rows) continue;
      const auto sorted = static_cast<std::size_t>(task.expert.row_begin + row + 8 * half);
      auto* const out = static_cast<Element*>(task.product.out) + sorted * outputs + at;
      *reinterpret_cast<uint4*>(out) = {words[0], words[1], words[2], words[3]};
    }
  }
}

/// Calls `function` with the layer's activation as a constant; a down product has none.
template <class Task, class Function>
__device__ void with_activation(const Task& task, Function&& function) {
  const Act activation = Task::down ? Act::relu : task.product.shape.activation;
  if constexpr (!Task::down) {
    if (activation == Act::relu2) return function(Chosen<Act::relu2>{});
    if (activation == Act::gelu) return function(Chosen<Act::gelu>{});
    if (activation == Act::gelu_tanh) return function(Chosen<Act::gelu_tanh>{});
    if (activation == Act::silu) return function(Chosen<Act::silu>{});
    if (activation == Act::silu_clamped) return function(Chosen<Act::silu_clamped>{});
    if (activation == Act::swiglu_clamped) return function(Chosen<Act::swiglu_clamped>{});
  }
  function(Chosen<Act::relu>{});
}

/// The same with the layer's activation.
template <class Task, class Element, int pairs, class Sum, class Up>
__device__ void finish_pairs(const Task& task, int row, int column, Sum&& sum, Up&& up) {
  with_activation(task, [&](auto activation) {
    finish_activated<Task, Element, pairs, activation.value>(task, row, column, sum, up);
  });
}

}  // namespace sida::cuda
