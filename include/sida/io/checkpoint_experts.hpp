// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "sida/core/data_type.hpp"
#include "sida/core/error.hpp"
#include "sida/core/moe_config.hpp"
#include "sida/io/checkpoint.hpp"
#include "sida/io/expert_names.hpp"
#include "sida/io/expert_tensors.hpp"
#include "sida/io/model_config.hpp"

namespace sida {

/// The MoE layers of a checkpoint.
struct CheckpointExperts {
  MoeConfig config;
  std::vector<std::string> layer_names;  ///< the modules around `experts`, in model order
  std::string layout;  ///< of the tensors: name_of(ExpertLayout), or "stacked, transposed"
  std::vector<std::vector<ExpertTensor>> tensors;  ///< of expert [layer * experts + expert]

  /// Bytes that all of them take in the files.
  std::uint64_t stored_bytes() const noexcept {
    std::uint64_t bytes = 0;
    for (const std::vector<ExpertTensor>& expert : tensors)
      for (const ExpertTensor& tensor : expert) bytes += sida::stored_bytes(tensor);
    return bytes;
  }
};

/// What find_experts is to look for.
struct ExpertSearch {
  std::vector<std::string> layers = {};  ///< these, in this order; empty: all that there are
  /// The shape that the tensors must have. Its activation, top_k and dtype are taken over.
  std::optional<MoeConfig> config = {};
  /// Of the slabs; empty: config's, or else the tensors' own, bf16 where they are packed.
  std::optional<DataType> dtype = {};
  /// Whether gate and up take turns in `gate_up_proj`; where config.json names a model in which
  /// they do, they are read so in any case.
  bool interleaved = false;
};

/// @cond
namespace detail {

/// The layers that `search` asks for, in its order or the model's.
inline std::vector<LayerReader> collect_layers(const Checkpoint& checkpoint,
                                               const ExpertSearch& search) {
  std::map<std::string, LayerReader> found;
  for (const auto& [name, tensor] : checkpoint.tensors()) {
    if (const auto parsed = parse_expert_tensor_name(name))
      found.try_emplace(parsed->layer, parsed->layer).first->second.add(*parsed, name, tensor);
  }
  const std::string path = checkpoint.path().string();
  if (found.empty())
    throw InvalidArgument(path +
                          ": expected MoE layers (tensors under a module 'experts'), found "
                          "none");
  std::vector<std::string> names = search.layers;
  if (names.empty()) {
    for (const auto& [name, layer] : found) names.push_back(name);
    std::sort(names.begin(), names.end(), layer_before);
  }
  std::vector<LayerReader> layers;
  for (const std::string& name : names) {
    auto layer = found.extract(name);
    if (layer.empty())
      throw InvalidArgument(
          path + ": expected each layer once and among the MoE layers of the " +
          "checkpoint, got " + in_quotes(name) +
          (found.empty() ? "" : "; another is " + in_quotes(found.begin()->first)));
    layers.push_back(std::move(layer.mapped()));
  }
  return layers;
}

/// Activation and top_k of `config`, its other fields known, from what the model's config.json
/// says.
inline void take_model_config(const std::optional<ModelConfig>& model, bool is_switch,
                              MoeConfig& config) {
  if (!model) {
    config.activation = config.gated ? Activation::silu : Activation::relu;
    return;
  }
  const auto missing = [&](const char* key) {
    return InvalidArgument(model->path + ": expected " + key +
                           ", found none; pass a MoeConfig to say what it is");
  };
  if (model->model_type == "gpt_oss" || model->model_type == "openai_privacy_filter") {
    config.activation = Activation::swiglu_clamped;  // whatever hidden_act says
    config.limit = model->swiglu_limit.value_or(config.limit);
    if (!model->top_k) throw missing("num_experts_per_tok");
    config.top_k = *model->top_k;
    return;
  }
  if (!model->activation) throw missing("hidden_act");
  const auto activation = transformers_activation(*model->activation);
  if (!activation)
    throw InvalidArgument(model->path +
                          ": expected an activation among relu, relu2, gelu, "
                          "gelu_new, gelu_pytorch_tanh, silu, swish; got " +
                          in_quotes(*model->activation));
  config.activation = *activation;
  if (config.gated && model->swiglu_limit && *activation == Activation::silu) {
    config.activation = Activation::silu_clamped;  // as in DeepSeek-V4
    config.limit = *model->swiglu_limit;
  }
  if (is_switch) return;  // top-1 by design; its config.json does not say so
  if (!model->top_k) throw missing("num_experts_per_tok");
  config.top_k = *model->top_k;
}

/// What the tensors' shapes say, in the fields that they determine.
inline MoeConfig shape_of(const MoeConfig& config) {
  return {.layers = config.layers,
          .experts = config.experts,
          .hidden_size = config.hidden_size,
          .intermediate_size = config.intermediate_size,
          .gated = config.gated,
          .up_bias = config.up_bias,
          .down_bias = config.down_bias};
}

inline std::string describe_shape(const MoeConfig& config) {
  const auto flag = [](bool value, const char* name) {
    return value ? std::string(", ") + name : std::string();
  };
  return std::to_string(config.layers) + " layers of " + std::to_string(config.experts) +
         " experts, hidden_size " + std::to_string(config.hidden_size) + ", intermediate_size " +
         std::to_string(config.intermediate_size) + flag(config.gated, "gated") +
         flag(config.up_bias, "up_bias") + flag(config.down_bias, "down_bias");
}

/// The dtype that all tensors have; bf16 where the matrices are packed, whatever their biases are.
/// @throws InvalidArgument if they differ.
inline DataType common_type(const std::vector<std::vector<ExpertTensor>>& experts) {
  const ExpertTensor& matrix = experts.front().front();
  if (matrix.scales) return DataType::bf16;
  for (const std::vector<ExpertTensor>& expert : experts) {
    for (const ExpertTensor& tensor : expert) {
      SIDA_EXPECTS(tensor.type == matrix.type, "expected experts of one dtype, got " +
                                                   std::string(name_of(matrix.type)) + " and " +
                                                   std::string(name_of(tensor.type)) +
                                                   "; say which dtype they are to be read as");
    }
  }
  return matrix.type;
}

}  // namespace detail
/// @endcond

/// Finds the experts of a checkpoint by the names and shapes of its tensors; reads no weight.
/// Activation and top_k come from `search.config`, or from config.json; without either, top_k is 1
/// and the activation silu where the experts are gated, else relu.
/// @throws InvalidArgument if there are none, a tensor is missing or has an unexpected shape or
/// dtype, layers differ, or config.json names what sida does not compute.
inline CheckpointExperts find_experts(const Checkpoint& checkpoint,
                                      const ExpertSearch& search = {}) {
  const std::optional<ModelConfig>& model = checkpoint.model_config();
  ExpertHints hints{.assume_plain = search.config.has_value(),
                    .interleaved = search.interleaved || (model && model->model_type == "gpt_oss")};
  if (model && model->fp8_block) hints.fp8_block = *model->fp8_block;
  hints.hidden_size = search.config ? search.config->hidden_size
                      : model       ? model->hidden_size.value_or(0)
                                    : 0;
  CheckpointExperts result;
  for (detail::LayerReader& layer : detail::collect_layers(checkpoint, search)) {
    MoeConfig config = layer.read(hints);
    const bool first = result.layer_names.empty();
    config.layers = 1;
    if (first) {
      result.config = config;
      result.layout = layer.layout();
    }
    SIDA_EXPECTS(config == result.config && layer.layout() == result.layout,
                 "layer " + in_quotes(layer.name()) + ": expected the shape of " +
                     in_quotes(result.layer_names.front()) + ", " +
                     detail::describe_shape(result.config) + " (" + result.layout + "); got " +
                     detail::describe_shape(config) + " (" + layer.layout() + ")");
    result.layer_names.push_back(layer.name());
    std::move(layer.parts().begin(), layer.parts().end(), std::back_inserter(result.tensors));
  }
  MoeConfig& config = result.config;
  config.layers = static_cast<std::int32_t>(result.layer_names.size());
  if (search.config) {
    SIDA_EXPECTS(detail::shape_of(*search.config) == detail::shape_of(config),
                 checkpoint.path().string() + ": expected " +
                     detail::describe_shape(*search.config) + "; got " +
                     detail::describe_shape(config));
    config = *search.config;
  } else {
    detail::take_model_config(model, result.layout == name_of(ExpertLayout::switch_transformers),
                              config);
    if (!search.dtype) config.dtype = detail::common_type(result.tensors);
  }
  if (search.dtype) config.dtype = *search.dtype;
  validate(config);
  return result;
}

}  // namespace sida
