// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string_view>

#include "sida/core/data_type.hpp"
#include "sida/core/half.hpp"
#include "sida/io/safetensors.hpp"

namespace sida {

/// How a file packs numbers that share scales.
enum class Packing : std::uint8_t {
  fp8,    ///< one e4m3 number a byte; a scale, which multiplies, for a rectangle of them
  mxfp4,  ///< two e2m1 numbers a byte, the low half first; a power of two for 32 of a row
};

constexpr std::string_view name_of(Packing packing) noexcept {
  return packing == Packing::fp8 ? "fp8" : "mxfp4";
}

/// The scales of a packed matrix: row-major, one for every block_rows × block_columns of its
/// numbers, also where the last blocks of a row or column are not full.
struct BlockScales {
  Packing packing = Packing::fp8;
  const SafetensorsFile* file = nullptr;
  std::uint64_t begin = 0;         ///< of the scale of the matrix's first block, in the file
  DataType type = DataType::f32;   ///< f32, f16 or bf16; u8: exponents of two, biased by 127
  std::int64_t block_rows = 1;     ///< numbers below each other that have one scale
  std::int64_t block_columns = 1;  ///< numbers beside each other that have one scale
  std::int64_t columns = 0;        ///< scales in a row

  std::int64_t codes_per_byte() const noexcept { return packing == Packing::fp8 ? 1 : 2; }
};

/// @cond
namespace detail {

/// The number that an e4m3 byte stands for: four bits of exponent, biased by 7, three of mantissa,
/// no infinities.
constexpr float decode_e4m3(unsigned code) noexcept {
  const unsigned exponent = code >> 3 & 15, mantissa = code & 7;
  float magnitude = static_cast<float>(mantissa) * 0x1p-9f;
  if (exponent == 15 && mantissa == 7) {
    magnitude = std::numeric_limits<float>::quiet_NaN();
  } else if (exponent != 0) {
    magnitude = std::bit_cast<float>((exponent + 120u) << 23 | mantissa << 20);
  }
  return code & 0x80 ? -magnitude : magnitude;
}

/// The number that four bits of e2m1 stand for.
constexpr float decode_e2m1(unsigned code) noexcept {
  constexpr std::array<float, 8> magnitudes{0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
  return code & 8 ? -magnitudes[code & 7] : magnitudes[code & 7];
}

template <std::size_t Count, class Decode>
constexpr std::array<float, Count> decode_all(Decode decode) noexcept {
  std::array<float, Count> numbers{};
  for (std::size_t code = 0; code < Count; ++code)
    numbers[code] = decode(static_cast<unsigned>(code));
  return numbers;
}
inline constexpr auto e4m3_numbers = decode_all<256>(decode_e4m3);
inline constexpr auto e2m1_numbers = decode_all<16>(decode_e2m1);

/// 2^(exponent - 127) in f32: subnormal at 0, infinite at 255.
constexpr float power_of_two(std::uint8_t exponent) noexcept {
  return exponent == 0 ? 0x1p-127f : std::bit_cast<float>(std::uint32_t{exponent} << 23);
}

}  // namespace detail
/// @endcond

}  // namespace sida
