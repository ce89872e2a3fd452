// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>

#include "sida/core/error.hpp"
#include "sida/core/tensor_view.hpp"

namespace sida {

/// The router of the layer behind, where it chooses for each token the top_k experts with the
/// largest scores: hidden · weightᵀ + bias, or with a correction the sigmoids of these plus it.
/// Borrowed, where the backend computes; what a view without shape stands for there is none of.
struct NextRouter {
  ConstTensorView weight;      ///< [E, H] f32 or the config's dtype
  ConstTensorView bias;        ///< [E] f32
  ConstTensorView correction;  ///< [E] f32
  std::int32_t top_k = 1;
};

/// @throws InvalidArgument unless `router` is one of `experts` for hidden states [T, hidden_size].
inline void check_router(const NextRouter& router, std::int32_t experts, std::int64_t hidden_size,
                         DataType dtype) {
  const ConstTensorView& weight = router.weight;
  SIDA_EXPECTS(weight.shape.size() == 2 && weight.shape[0] == experts &&
                   weight.shape[1] == hidden_size &&
                   (weight.type == DataType::f32 || weight.type == dtype),
               "the next router's weight: expected [" + std::to_string(experts) + ", " +
                   std::to_string(hidden_size) + "] f32 or " + std::string(name_of(dtype)) +
                   ", got " + weight.describe());
  for (const ConstTensorView* added : {&router.bias, &router.correction})
    SIDA_EXPECTS(added->shape.empty() || (added->shape.size() == 1 && added->shape[0] == experts &&
                                          added->type == DataType::f32),
                 "the next router's bias and correction: expected [" + std::to_string(experts) +
                     "] f32, got " + added->describe());
  SIDA_EXPECTS(router.top_k >= 1 && router.top_k <= experts,
               "the next router's top_k: expected 1 to " + std::to_string(experts) + ", got " +
                   std::to_string(router.top_k));
}

}  // namespace sida
