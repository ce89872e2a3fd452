// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>

#include "sida/core/error.hpp"
#include "sida/ffn/kernel_table.hpp"
#include "sida/io/json.hpp"

namespace sida {

/// The kernels in a JSON file as `sida tune` writes it: {"format": "sida-kernels", "gpu": ...,
/// "choices": [...]}, whose entries have KernelChoice's fields; what else an entry has, such as
/// times, is for people. Names of kernels are use_kernels()'s to check.
/// @throws IoError for a file that cannot be read or is not so.
inline KernelTable load_kernel_table(const std::filesystem::path& path) {
  constexpr std::uint64_t max_bytes = std::uint64_t{4} << 20;
  const nlohmann::json json = read_json(path, max_bytes);
  std::string where = path.string();
  const auto field = [&](const nlohmann::json& object, const char* key, const char* expected,
                         auto&& is_right) -> const nlohmann::json& {
    const auto found = object.is_object() ? object.find(key) : object.end();
    if (found == object.end() || !is_right(*found))
      throw IoError(where + ": expected " + in_quotes(key) + " to be " + expected + ", got " +
                    (found == object.end() ? "nothing" : in_quotes(found->dump())) +
                    "; delete the file and measure anew with `sida tune`");
    return *found;
  };
  const auto is_text = [](const auto& value) { return value.is_string(); };
  const auto is_size = [](const auto& value) {
    return value.is_number_unsigned() && value.template get<std::uint64_t>() >= 1 &&
           value.template get<std::uint64_t>() <= INT32_MAX;
  };
  field(json, "format", "\"sida-kernels\"",
        [](const auto& value) { return value == "sida-kernels"; });
  KernelTable table;
  table.gpu = field(json, "gpu", "a text", is_text).get<std::string>();
  const auto& choices =
      field(json, "choices", "a list", [](const auto& value) { return value.is_array(); });
  for (const nlohmann::json& entry : choices) {
    where = path.string() + ", entry " + std::to_string(table.choices.size());
    const auto size = [&](const char* key) {
      return field(entry, key, "a whole number above 0", is_size).template get<std::int32_t>();
    };
    KernelChoice choice;
    choice.dtype = parse_data_type(field(entry, "dtype", "f32, f16 or bf16", [](const auto& value) {
                                     return value == "f32" || value == "f16" || value == "bf16";
                                   }).get<std::string>());
    choice.gated = field(entry, "gated", "true or false", [](const auto& value) {
                     return value.is_boolean();
                   }).get<bool>();
    choice.top_k = size("top_k");
    choice.experts = size("experts");
    choice.hidden_size = size("hidden_size");
    choice.intermediate_size = size("intermediate_size");
    choice.tokens = size("tokens");
    choice.kernel = field(entry, "kernel", "a text", is_text).get<std::string>();
    table.choices.push_back(std::move(choice));
  }
  return table;
}

}  // namespace sida
