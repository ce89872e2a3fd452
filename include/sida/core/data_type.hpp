// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "sida/core/error.hpp"

namespace sida {

/// Element types that sida computes with (f32, f16, bf16), indexes with (i32, i64) or checks
/// against (f64).
enum class DataType : std::uint8_t { f32, f16, bf16, f64, i32, i64, u8 };

/// Bytes of one element.
constexpr std::size_t size_of(DataType type) noexcept {
  switch (type) {
    case DataType::f64:
    case DataType::i64:
      return 8;
    case DataType::f32:
    case DataType::i32:
      return 4;
    case DataType::f16:
    case DataType::bf16:
      return 2;
    case DataType::u8:
      return 1;
  }
  return 0;
}

/// "f32", "f16", ...: the spelling in messages, in files of sida's and in Python.
constexpr std::string_view name_of(DataType type) noexcept {
  switch (type) {
    case DataType::f64:
      return "f64";
    case DataType::i64:
      return "i64";
    case DataType::f32:
      return "f32";
    case DataType::i32:
      return "i32";
    case DataType::f16:
      return "f16";
    case DataType::bf16:
      return "bf16";
    case DataType::u8:
      return "u8";
  }
  return "?";
}

/// The inverse of name_of. @throws InvalidArgument for any other name.
inline DataType parse_data_type(std::string_view name) {
  for (const DataType type : {DataType::f32, DataType::f16, DataType::bf16, DataType::f64,
                              DataType::i32, DataType::i64, DataType::u8}) {
    if (name_of(type) == name) return type;
  }
  throw InvalidArgument("expected a dtype among f32, f16, bf16, f64, i32, i64, u8; got '" +
                        std::string(name) + "'");
}

}  // namespace sida
