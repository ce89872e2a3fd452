// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "sida/ffn/slab_layout.hpp"

namespace sida {

/// The rows of a call that go to one expert, and its weights.
struct ExpertTask {
  ExpertWeights weights;
  std::int64_t row_begin = 0;  ///< of the sorted order; on the CPU, which knows it
  std::int64_t row_end = 0;
  std::int32_t expert = -1;  ///< on the GPU, whose plan has the rows
};

/// Computes the experts of one MoE layer call on a backend:
/// `out[t] = Σ_j weights[t, j] * expert(ids[t, j])(hidden[t])`.
///
/// A call is begin(), then compute() for the experts as they become resident (any subset, in any
/// order, each row once), then combine(). Where experts lie and when they arrive is the caller's
/// affair; an element of the result depends only on dtype, shape, instruction set or device, and
/// the rows of its expert in the whole call, never on how compute() calls are divided, on threads
/// or on addresses.
///
/// Each backend specialises it: sida/ffn/expert_ffn_cpu.hpp, expert_ffn_cuda.hpp. RoutedCall makes
/// the calls of all of them alike.
template <class Backend>
class ExpertFfn;

}  // namespace sida
