// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <charconv>
#include <cstdint>
#include <span>
#include <string>
#include <system_error>
#include <type_traits>
#include <vector>

#include "sida/core/data_type.hpp"
#include "sida/core/error.hpp"
#include "sida/io/json.hpp"
#include "sida/io/safetensors.hpp"

namespace sida {

// What sida's own files have in common: safetensors whose metadata name a format and its version.

/// Checks that `file` is of sida's format `format`, version 1. @throws IoError.
inline void expect_format(const SafetensorsFile& file, const std::string& format) {
  const auto value = [&](const char* key) {
    const auto found = file.metadata().find(key);
    return found == file.metadata().end() ? std::string() : found->second;
  };
  if (value("format") != format)
    throw IoError(
        file.path().string() + ": expected a file of format '" + format + "', got " +
        (value("format").empty() ? "none of sida's formats" : in_quotes(value("format"))));
  if (value("version") != "1")
    throw IoError(file.path().string() + ": expected version '1' of '" + format + "', got " +
                  in_quotes(value("version")) + "; a newer sida may read it");
}

/// The metadata entry `key`. @throws IoError if there is none.
inline const std::string& metadata_text(const SafetensorsFile& file, const std::string& key) {
  const auto found = file.metadata().find(key);
  if (found == file.metadata().end())
    throw IoError(file.path().string() + ": expected metadata '" + key + "', found none");
  return found->second;
}

/// The number that `text`, the metadata entry `key` or a part of it, spells. @throws IoError.
template <class Number>
Number metadata_number(const SafetensorsFile& file, const std::string& key, std::string_view text) {
  Number value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size())
    throw IoError(file.path().string() + ": expected a number in metadata '" + key + "', got " +
                  in_quotes(text));
  return value;
}

/// The metadata entry `key`, a number of at least `smallest`. @throws IoError.
template <class Number>
Number metadata_number(const SafetensorsFile& file, const std::string& key, Number smallest) {
  const std::string& text = metadata_text(file, key);
  const auto value = metadata_number<Number>(file, key, std::string_view(text));
  if (!(value >= smallest))
    throw IoError(file.path().string() + ": expected metadata '" + key + "' of at least " +
                  std::to_string(smallest) + ", got " + in_quotes(text));
  return value;
}

/// The elements of the tensor called `name`, which has to have the type of `T` (f32, i32 or i64).
/// @throws IoError if it is missing, has another dtype, or cannot be read.
template <class T>
std::vector<T> read_values(const SafetensorsFile& file, const std::string& name) {
  constexpr DataType type = std::is_same_v<T, float>          ? DataType::f32
                            : std::is_same_v<T, std::int32_t> ? DataType::i32
                                                              : DataType::i64;
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, std::int32_t> ||
                std::is_same_v<T, std::int64_t>);
  const SafetensorsTensor& tensor = file.tensor(name);
  if (tensor.dtype != safetensors_name(type))
    throw IoError(file.path().string() + ": tensor " + in_quotes(name) + ": expected " +
                  safetensors_name(type) + ", got " + tensor.dtype);
  std::vector<T> values(static_cast<std::size_t>(tensor.end - tensor.begin) / sizeof(T));
  file.read(tensor.begin, std::as_writable_bytes(std::span(values)));
  return values;
}

}  // namespace sida
