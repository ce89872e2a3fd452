// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "expert_kernels.hpp"

namespace sida::cuda {

/// The two matrix products of an expert; the first one in two kinds.
enum class Phase : std::uint8_t { up, gated_up, down };

/// One product for all rows of a plan: reads hidden [T, H] (up) or activations [T * k, I] (down),
/// writes activations of the dtype (up) or results (down): [splits, T * k, H] in f32, or [T * k, H]
/// of the dtype where short_results() says so.
struct Product {
  LayerShape shape;
  Plan plan;
  ExpertSlabs slabs;
  const void* in;
  void* out;
};

}  // namespace sida::cuda
