// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <type_traits>

#include "sida/core/error.hpp"
#include "sida/core/moe_config.hpp"
#include "sida/io/json.hpp"

namespace sida {

/// The config as a JSON object whose keys are MoeConfig's fields.
inline nlohmann::json to_json(const MoeConfig& config) {
  return {{"layers", config.layers},
          {"experts", config.experts},
          {"hidden_size", config.hidden_size},
          {"intermediate_size", config.intermediate_size},
          {"top_k", config.top_k},
          {"activation", name_of(config.activation)},
          {"gated", config.gated},
          {"up_bias", config.up_bias},
          {"down_bias", config.down_bias},
          {"dtype", name_of(config.dtype)},
          {"limit", config.limit}};
}

/// The inverse of to_json. Sizes are required; the other keys have MoeConfig's defaults.
/// @throws InvalidArgument naming a key that is unknown, missing or has an unexpected value.
inline MoeConfig moe_config_from_json(const nlohmann::json& json) {
  SIDA_EXPECTS(json.is_object(), "MoeConfig: expected a JSON object");
  const nlohmann::json known = to_json(MoeConfig{});
  for (const auto& [key, value] : json.items())
    SIDA_EXPECTS(known.contains(key), "MoeConfig: unknown key " + in_quotes(key));
  const auto get = [&]<class T>(const char* key, T& field) {
    const auto found = json.find(key);
    if (found == json.end()) return;
    const auto wrong = [&](const char* expected) {
      throw InvalidArgument(std::string("MoeConfig: expected ") + key + " to be " + expected +
                            ", got " + in_quotes(found->dump()));
    };
    if constexpr (std::is_same_v<T, bool>) {
      if (!found->is_boolean()) wrong("true or false");
    } else if constexpr (std::is_same_v<T, std::string>) {
      if (!found->is_string()) wrong("a string");
    } else if constexpr (std::is_same_v<T, float>) {
      if (!found->is_number()) wrong("a number");
    } else {
      if (!found->is_number_unsigned() || found->template get<std::uint64_t>() > INT32_MAX)
        wrong("a non-negative 32-bit integer");
    }
    field = found->template get<T>();
  };
  MoeConfig config;
  get("layers", config.layers);
  get("experts", config.experts);
  get("hidden_size", config.hidden_size);
  get("intermediate_size", config.intermediate_size);
  get("top_k", config.top_k);
  get("gated", config.gated);
  get("up_bias", config.up_bias);
  get("down_bias", config.down_bias);
  get("limit", config.limit);
  std::string activation(name_of(config.activation)), dtype(name_of(config.dtype));
  get("activation", activation);
  get("dtype", dtype);
  config.activation = parse_activation(activation);
  config.dtype = parse_data_type(dtype);
  validate(config);
  return config;
}

}  // namespace sida
