// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "sida/core/data_type.hpp"
#include "sida/core/half.hpp"

namespace sida::detail {

inline void convert(Half from, float& to) noexcept { to = to_f32(from); }
inline void convert(BFloat16 from, float& to) noexcept { to = to_f32(from); }
inline void convert(float from, Half& to) noexcept { to = to_f16(from); }
inline void convert(float from, BFloat16& to) noexcept { to = to_bf16(from); }

/// Reads `count` elements stored as `From`, at any address.
template <class From, class To>
void read_elements(const std::byte* from, To* to, std::int64_t count) noexcept {
  for (std::int64_t i = 0; i < count; ++i) {
    From element;
    std::memcpy(&element, from + static_cast<std::size_t>(i) * sizeof(From), sizeof(From));
    convert(element, to[i]);
  }
}

/// Writes `count` elements stored as `To`, at any address.
template <class To, class From>
void write_elements(const From* from, std::byte* to, std::int64_t count) noexcept {
  for (std::int64_t i = 0; i < count; ++i) {
    To element;
    convert(from[i], element);
    std::memcpy(to + static_cast<std::size_t>(i) * sizeof(To), &element, sizeof(To));
  }
}

/// to[i] = element i of a row stored as `type`: f32, f16 or bf16.
inline void read_row(const std::byte* from, DataType type, float* to, std::int64_t count) noexcept {
  if (type == DataType::f16) return read_elements<Half>(from, to, count);
  if (type == DataType::bf16) return read_elements<BFloat16>(from, to, count);
  std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof(float));
}
/// The same for a row that is stored as bf16 and stays it.
inline void read_row(const std::byte* from, DataType, BFloat16* to, std::int64_t count) noexcept {
  std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof(BFloat16));
}
/// The same for a row of f64.
inline void read_row(const std::byte* from, DataType, double* to, std::int64_t count) noexcept {
  std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof(double));
}

/// Stores a row as `type` (f32, f16 or bf16), rounded to the nearest.
inline void write_row(const float* from, DataType type, std::byte* to,
                      std::int64_t count) noexcept {
  if (type == DataType::f16) return write_elements<Half>(from, to, count);
  if (type == DataType::bf16) return write_elements<BFloat16>(from, to, count);
  std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof(float));
}
/// Stores a row of f64.
inline void write_row(const double* from, DataType, std::byte* to, std::int64_t count) noexcept {
  std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof(double));
}

}  // namespace sida::detail
