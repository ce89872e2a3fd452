// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <type_traits>

#include "element.cuh"
#include "product.hpp"
#include "splits.hpp"

namespace sida::cuda {

/// The product for one expert, as a block sees it.
template <class Element, Phase phase>
struct ExpertProduct {
  static constexpr bool down = phase == Phase::down, gated = phase == Phase::gated_up;
  const Product& product;
  const std::byte* slab;
  ActiveExpert expert;

  __device__ int outputs() const {
    return down ? product.shape.hidden : product.shape.intermediate;
  }
  __device__ int depth() const { return down ? product.shape.intermediate : product.shape.hidden; }

  /// Row `index` of the weights: with a gate rows [0, I) are the gate's.
  __device__ const Element* weights(int index) const {
    const std::byte* part = slab + (down ? product.slabs.down_offset : product.slabs.up_offset);
    return reinterpret_cast<const Element*>(part) + static_cast<std::size_t>(index) * depth();
  }

  /// Where among the product's input rows that of row `row` of the expert's rows is.
  __device__ int input_row(int row) const {
    const int sorted = expert.row_begin + row;
    return down ? sorted : product.plan.order[sorted] / product.shape.top_k;
  }

  /// The input of row `row` of the expert's rows.
  __device__ const Element* input(int row) const {
    return static_cast<const Element*>(product.in) +
           static_cast<std::size_t>(input_row(row)) * depth();
  }

  __device__ bool has_bias() const {
    return down ? product.shape.down_bias : product.shape.up_bias;
  }

  __device__ float bias(int index) const {
    if (!has_bias()) return 0.0f;
    const std::byte* part =
        slab + (down ? product.slabs.down_bias_offset : product.slabs.up_bias_offset);
    return to_float(reinterpret_cast<const Element*>(part)[index]);
  }

  /// Finishes output `index` of row `row`: `sum` is the weights' (with a gate: the gate's) product,
  /// `up` the product beside the gate. Only the first split adds the bias.
  __device__ void finish(int row, int index, int split, float sum, float up) const {
    const std::size_t sorted = static_cast<std::size_t>(expert.row_begin + row);
    const std::size_t at = sorted * outputs() + index;
    if (split == 0) sum += bias(index);
    if constexpr (down) {
      const std::size_t part = static_cast<std::size_t>(product.shape.tokens) *
                               product.shape.top_k * product.shape.hidden;
      static_cast<float*>(product.out)[split * part + at] = sum;
    } else {
      float value = activated(product.shape.activation, sum, product.shape.limit);
      if constexpr (gated)
        value *= beside_gate(product.shape.activation, up + bias(outputs() + index),
                             product.shape.limit);
      static_cast<Element*>(product.out)[at] = rounded<Element>(value);
    }
  }
};

/// Calls `function` with a value of a product's element type, which has 16 bits, and its phase as a
/// constant.
template <class Function>
void with_product(const Product& product, Phase phase, Function&& function) {
  const auto with_phase = [&](auto element) {
    if (phase == Phase::down)
      return function(element, std::integral_constant<Phase, Phase::down>{});
    if (phase == Phase::up) return function(element, std::integral_constant<Phase, Phase::up>{});
    function(element, std::integral_constant<Phase, Phase::gated_up>{});
  };
  if (product.shape.dtype == Dtype::f16) return with_phase(__half{});
  with_phase(__nv_bfloat16{});
}

}  // namespace sida::cuda
