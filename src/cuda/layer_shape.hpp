// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "expert_kernels.hpp"
#include "sida/core/error.hpp"
#include "sida/core/moe_config.hpp"
#include "sida/ffn/slab_layout.hpp"

/// sida's words for a layer as those of the kernels.
namespace sida::cuda {

/// @throws InvalidArgument for a dtype that no kernel computes with.
inline Dtype kernel_type(DataType type) {
  switch (type) {
    case DataType::f32:
      return Dtype::f32;
    case DataType::f16:
      return Dtype::f16;
    case DataType::bf16:
      return Dtype::bf16;
    default:
      throw InvalidArgument("dtype: expected f32, f16 or bf16 on cuda, got " +
                            std::string(name_of(type)) + "; use device='cpu'");
  }
}

inline Act kernel_activation(Activation activation) {
  switch (activation) {
    case Activation::relu:
      return Act::relu;
    case Activation::relu2:
      return Act::relu2;
    case Activation::gelu:
      return Act::gelu;
    case Activation::gelu_tanh:
      return Act::gelu_tanh;
    case Activation::silu:
      return Act::silu;
    case Activation::silu_clamped:
      return Act::silu_clamped;
    case Activation::swiglu_clamped:
      return Act::swiglu_clamped;
  }
  throw InvalidArgument(
      "activation: expected one of relu, relu2, gelu, gelu_tanh, silu, silu_clamped, "
      "swiglu_clamped");
}

/// The layer that a config describes, of a call without tokens.
/// @throws InvalidArgument for a config that cannot be right or that no kernel computes.
inline LayerShape shape_of(const MoeConfig& config) {
  validate(config);
  SIDA_EXPECTS(config.experts <= max_experts && config.top_k <= max_top_k,
               "cuda: expected at most " + std::to_string(max_experts) +
                   " experts and top_k of at most " + std::to_string(max_top_k) + ", got " +
                   std::to_string(config.experts) + " and " + std::to_string(config.top_k));
  LayerShape shape;
  shape.dtype = kernel_type(config.dtype);
  shape.top_k = config.top_k;
  shape.experts = config.experts;
  shape.hidden = static_cast<int>(config.hidden_size);
  shape.intermediate = static_cast<int>(config.intermediate_size);
  shape.activation = kernel_activation(config.activation);
  shape.limit = config.limit;
  shape.gated = config.gated;
  shape.up_bias = config.up_bias;
  shape.down_bias = config.down_bias;
  return shape;
}

/// Slabs of a layout in an arena; slots: [E] i32 on the device, see ExpertSlabs::slot_of.
inline ExpertSlabs slabs_in(const std::byte* arena, const SlabLayout& layout,
                            const std::byte* slots) {
  return {arena,
          layout.slab_bytes,
          reinterpret_cast<const std::int32_t*>(slots),
          layout.up_offset,
          layout.down_offset,
          layout.up_bias_offset,
          layout.down_bias_offset};
}

}  // namespace sida::cuda
