// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <string_view>

#include "sida/core/data_type.hpp"
#include "sida/core/error.hpp"

namespace sida {

/// What stands between the two matrices of an expert. `relu2` is relu's square, `gelu` the exact
/// one (erf), `gelu_tanh` its tanh approximation. The clamped ones go with `gated` alone and cut
/// both products at MoeConfig's `limit`: gate' = min(gate, limit), up' = up cut to [-limit, limit].
/// `silu_clamped` is silu(gate') · up', `swiglu_clamped` gate' · sigmoid(1.702 gate') · (up' + 1).
enum class Activation : std::uint8_t {
  relu,
  relu2,
  gelu,
  gelu_tanh,
  silu,
  silu_clamped,
  swiglu_clamped
};

/// Whether gate and up are cut at MoeConfig's `limit`.
constexpr bool is_clamped(Activation activation) noexcept {
  return activation == Activation::silu_clamped || activation == Activation::swiglu_clamped;
}

constexpr std::string_view name_of(Activation activation) noexcept {
  switch (activation) {
    case Activation::relu:
      return "relu";
    case Activation::relu2:
      return "relu2";
    case Activation::gelu:
      return "gelu";
    case Activation::gelu_tanh:
      return "gelu_tanh";
    case Activation::silu:
      return "silu";
    case Activation::silu_clamped:
      return "silu_clamped";
    case Activation::swiglu_clamped:
      return "swiglu_clamped";
  }
  return "?";
}

/// The inverse of name_of. @throws InvalidArgument for any other name.
inline Activation parse_activation(std::string_view name) {
  for (const Activation activation :
       {Activation::relu, Activation::relu2, Activation::gelu, Activation::gelu_tanh,
        Activation::silu, Activation::silu_clamped, Activation::swiglu_clamped}) {
    if (name_of(activation) == name) return activation;
  }
  throw InvalidArgument(
      "expected an activation among relu, relu2, gelu, gelu_tanh, silu, silu_clamped, "
      "swiglu_clamped; got '" +
      std::string(name) + "'");
}

/// The shape that all experts of a model share. An expert computes
/// `down · act(up · x + up_bias) + down_bias`, or with `gated`
/// `down · (act(gate · x) ⊙ (up · x)) + down_bias`.
struct MoeConfig {
  std::int32_t layers = 0;             ///< MoE layers, counted over encoder and decoder
  std::int32_t experts = 0;            ///< experts in each MoE layer
  std::int32_t hidden_size = 0;        ///< H
  std::int32_t intermediate_size = 0;  ///< I
  std::int32_t top_k = 1;              ///< experts a token is routed to
  Activation activation = Activation::relu;
  bool gated = false;
  bool up_bias = false;
  bool down_bias = false;
  DataType dtype = DataType::f32;  ///< of the weights and of the hidden states
  float limit = 7.0f;              ///< what clamped activations cut gate and up at

  std::int64_t total_experts() const noexcept { return std::int64_t{layers} * experts; }

  friend bool operator==(const MoeConfig&, const MoeConfig&) = default;
};

/// @throws InvalidArgument naming the first field that cannot be right.
inline void validate(const MoeConfig& config) {
  const auto positive = [](std::int64_t value, const char* name) {
    SIDA_EXPECTS(value > 0,
                 std::string("MoeConfig: expected ") + name + " > 0, got " + std::to_string(value));
  };
  positive(config.layers, "layers");
  positive(config.experts, "experts");
  positive(config.hidden_size, "hidden_size");
  positive(config.intermediate_size, "intermediate_size");
  positive(config.top_k, "top_k");
  SIDA_EXPECTS(config.top_k <= config.experts, "MoeConfig: expected top_k <= experts (" +
                                                   std::to_string(config.experts) + "), got " +
                                                   std::to_string(config.top_k));
  SIDA_EXPECTS(config.gated || !is_clamped(config.activation),
               "MoeConfig: expected gated experts with " + std::string(name_of(config.activation)) +
                   ", which cuts gate and up");
  SIDA_EXPECTS(std::isfinite(config.limit) && config.limit > 0,
               "MoeConfig: expected a finite limit > 0, got " + std::to_string(config.limit));
  SIDA_EXPECTS(
      config.dtype == DataType::f32 || config.dtype == DataType::f16 ||
          config.dtype == DataType::bf16 || config.dtype == DataType::f64,
      "MoeConfig: expected dtype f32, f16 or bf16, got " + std::string(name_of(config.dtype)));
}

}  // namespace sida
