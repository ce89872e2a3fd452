// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "expert_kernels.hpp"

namespace sida::cuda {

/// How the two matrix products of an expert are computed.
enum class Kernel : std::uint8_t {
  narrow,   ///< mma.sync on streamed weights, 16 weight rows and 8 tokens at a time
  wide,     ///< the same with 32 weight rows and 32 tokens at a time
  general,  ///< plain f32 arithmetic: any dtype, any size
};

/// The kernel for a call of `rows` tokens with `top_k` choices each. narrow and wide give the same
/// bits.
Kernel choose_kernel(Dtype dtype, int rows, int top_k, int experts, int hidden, int intermediate);

}  // namespace sida::cuda
