// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <string_view>

#include "sida/core/error.hpp"
#include "sida/core/moe_config.hpp"
#include "sida/io/json.hpp"

namespace sida {

/// What sida takes from a model's config.json. A field that the file lacks is empty.
struct ModelConfig {
  std::string path;  ///< of the file, for messages
  std::string model_type;
  std::optional<std::int32_t> hidden_size;
  std::optional<std::string> activation;  ///< transformers' name for it
  std::optional<std::int32_t> top_k;
  std::optional<float> swiglu_limit;  ///< what gate and up are cut at
  /// Rows and columns of the blocks of fp8 weights that share a scale.
  std::optional<std::array<std::int64_t, 2>> fp8_block;
};

/// @cond
namespace detail {

/// The first of `keys` that the config, or the text model's in a multimodal one, holds.
inline const nlohmann::json* find_key(const nlohmann::json& config,
                                      std::initializer_list<const char*> keys) {
  for (const char* key : keys) {
    if (const auto found = config.find(key); found != config.end() && !found->is_null())
      return &*found;
  }
  const auto text = config.find("text_config");
  return text != config.end() && text->is_object() ? find_key(*text, keys) : nullptr;
}

/// quantization_config's weight_block_size of a model in fp8, if it is one. @throws IoError.
inline std::optional<std::array<std::int64_t, 2>> fp8_block(const nlohmann::json& config,
                                                            const std::string& path) {
  const nlohmann::json* quantization = find_key(config, {"quantization_config"});
  if (!quantization || !quantization->is_object() ||
      quantization->value("quant_method", nlohmann::json()) != "fp8")
    return std::nullopt;
  const nlohmann::json size = quantization->value("weight_block_size", nlohmann::json());
  const auto positive = [](const nlohmann::json& value) {
    return value.is_number_unsigned() && value.get<std::uint64_t>() >= 1 &&
           value.get<std::uint64_t>() <= INT32_MAX;
  };
  if (!size.is_array() || size.size() != 2 || !positive(size[0]) || !positive(size[1]))
    throw IoError(path +
                  ": expected quantization_config's weight_block_size to be two positive "
                  "integers, as DeepSeek-V3 has them, got " +
                  in_quotes(size.dump()) + "; fp8 with other scales is not supported");
  return std::array{size[0].get<std::int64_t>(), size[1].get<std::int64_t>()};
}

}  // namespace detail
/// @endcond

/// Reads a config.json as transformers writes it. @throws IoError.
inline ModelConfig read_model_config(const std::filesystem::path& path) {
  const nlohmann::json json = read_json(path, std::uint64_t{16} << 20);
  if (!json.is_object()) throw IoError(path.string() + ": expected a JSON object");
  const auto integer = [&](std::initializer_list<const char*> keys) {
    const nlohmann::json* value = detail::find_key(json, keys);
    if (!value) return std::optional<std::int32_t>();
    if (!value->is_number_unsigned() || value->get<std::uint64_t>() < 1 ||
        value->get<std::uint64_t>() > INT32_MAX)
      throw IoError(path.string() + ": expected " + *keys.begin() +
                    " to be a positive integer, got " + in_quotes(value->dump()));
    return std::optional(value->get<std::int32_t>());
  };
  const auto positive = [&](std::initializer_list<const char*> keys) {
    const nlohmann::json* value = detail::find_key(json, keys);
    if (!value) return std::optional<float>();
    const bool right = value->is_number() && value->get<double>() > 0 &&
                       value->get<double>() <= std::numeric_limits<float>::max();
    if (!right)
      throw IoError(path.string() + ": expected " + *keys.begin() +
                    " to be a positive number, got " + in_quotes(value->dump()));
    return std::optional(value->get<float>());
  };
  const auto text = [&](std::initializer_list<const char*> keys) {
    const nlohmann::json* value = detail::find_key(json, keys);
    if (!value) return std::optional<std::string>();
    if (!value->is_string())
      throw IoError(path.string() + ": expected " + *keys.begin() + " to be a string, got " +
                    in_quotes(value->dump()));
    return std::optional(value->get<std::string>());
  };
  ModelConfig config;
  config.path = path.string();
  config.model_type = text({"model_type"}).value_or("");
  config.hidden_size = integer({"hidden_size", "d_model"});
  config.activation = text({"hidden_act", "hidden_activation", "mlp_hidden_act", "dense_act_fn"});
  config.top_k = integer({"num_experts_per_tok"});
  config.swiglu_limit = positive({"swiglu_limit"});
  config.fp8_block = detail::fp8_block(json, config.path);
  return config;
}

/// The activation that transformers calls `name`, if sida has it.
inline std::optional<Activation> transformers_activation(std::string_view name) {
  struct Name {
    std::string_view name;
    Activation activation;
  };
  static constexpr std::array<Name, 7> names{{{"relu", Activation::relu},
                                              {"relu2", Activation::relu2},
                                              {"gelu", Activation::gelu},
                                              {"gelu_new", Activation::gelu_tanh},
                                              {"gelu_pytorch_tanh", Activation::gelu_tanh},
                                              {"silu", Activation::silu},
                                              {"swish", Activation::silu}}};
  for (const Name& known : names)
    if (known.name == name) return known.activation;
  return std::nullopt;
}

}  // namespace sida
