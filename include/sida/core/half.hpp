// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <bit>
#include <cstdint>

namespace sida {

/// An IEEE 754 binary16 number, as stored.
struct Half {
  std::uint16_t bits = 0;
};

/// A bfloat16 number (the upper half of a binary32), as stored.
struct BFloat16 {
  std::uint16_t bits = 0;
};

/// The same number in f32, exactly. A NaN stays one.
constexpr float to_f32(BFloat16 value) noexcept {
  return std::bit_cast<float>(std::uint32_t{value.bits} << 16);
}

/// The same number in f32, exactly. A NaN stays one.
constexpr float to_f32(Half value) noexcept {
  const std::uint32_t sign = (value.bits & 0x8000u) << 16;
  const std::uint32_t exponent = value.bits >> 10 & 0x1fu;
  const std::uint32_t mantissa = value.bits & 0x3ffu;
  if (exponent == 0) {  // zero and subnormals count units of 2^-24
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(magnitude));
  }
  const std::uint32_t rebiased = exponent == 31 ? 255u : exponent + 112u;
  return std::bit_cast<float>(sign | rebiased << 23 | mantissa << 13);
}

/// The nearest bf16 number, ties to even. Overflow gives infinity; a NaN stays one.
constexpr BFloat16 to_bf16(float value) noexcept {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u)
    return {static_cast<std::uint16_t>(bits >> 16 | 0x40u)};  // stays a NaN when cut
  return {static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

/// The nearest f16 number, ties to even. Overflow gives infinity; a NaN stays one.
constexpr Half to_f16(float value) noexcept {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = bits >> 16 & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  std::uint32_t half = 0;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and more round to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 rounds to units of 2^-24
    half = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13;
  }
  return {static_cast<std::uint16_t>(sign | half)};
}

}  // namespace sida
