// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include "expert_kernels.hpp"

/// What the next layer's router would choose on the input of the layer at hand, for look-ahead.
namespace sida::cuda {

/// See sida::NextRouter. On the device.
struct RouterWeights {
  const void* weight = nullptr;       ///< [E, H], aligned to 16 bytes
  Dtype weight_type = Dtype::f32;     ///< f32, or that of the hidden states
  const float* bias = nullptr;        ///< [E], or null
  const float* correction = nullptr;  ///< [E], or null: scores are compared as they are
  int experts = 1;                    ///< 1 to max_experts
  int top_k = 1;                      ///< 1 to max_top_k
};

/// Tokens of a call that guesses are made for, at most.
constexpr int most_guessing_tokens = 32;

/// Bytes of scratch memory of guess_choices(): zeros before the first call; calls that share it are
/// enqueued in one order.
std::size_t guess_bytes(int experts);

/// Writes the choices of each token, the best first, to `host_ids` [T, k] in pinned memory; -1
/// where all scores left are NaNs. Ties may go either way: nothing but time hangs on it.
///
/// hidden: [tokens, hidden_size] of `dtype`, aligned to 16 bytes.
/// @throws std::invalid_argument for sizes out of range, std::runtime_error if the launch fails.
void guess_choices(Dtype dtype, int tokens, int hidden_size, const void* hidden,
                   const RouterWeights& router, std::byte* scratch, std::int32_t* host_ids,
                   Stream stream);

}  // namespace sida::cuda
