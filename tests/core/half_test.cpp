// SPDX-License-Identifier: Apache-2.0
#include "sida/core/half.hpp"

#include <Eigen/Core>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "support/catch.hpp"

namespace sida {
namespace {

TEST_CASE("Every f16 and bf16 number survives the way to f32 and back", "[half]") {
  for (std::uint32_t i = 0; i < 65536; ++i) {
    const auto bits = static_cast<std::uint16_t>(i);
    const float half = to_f32(Half{bits}), brain = to_f32(BFloat16{bits});
    const float expected =
        Eigen::half_impl::half_to_float(Eigen::half_impl::raw_uint16_to_half(bits));
    if (std::isnan(expected)) {
      REQUIRE(std::isnan(half));
      REQUIRE(std::isnan(to_f32(to_f16(half))));
    } else {
      REQUIRE(std::bit_cast<std::uint32_t>(half) == std::bit_cast<std::uint32_t>(expected));
      REQUIRE(to_f16(half).bits == bits);
    }
    REQUIRE(std::bit_cast<std::uint32_t>(brain) == i << 16);
    if (std::isnan(brain))
      REQUIRE(std::isnan(to_f32(to_bf16(brain))));
    else
      REQUIRE(to_bf16(brain).bits == bits);
  }
}

TEST_CASE("f32 numbers are rounded to the nearest, ties to even", "[half]") {
  for (std::uint64_t i = 0; i < std::uint64_t{1} << 32; i += 977) {
    const auto value = std::bit_cast<float>(static_cast<std::uint32_t>(i));
    if (std::isnan(value)) continue;
    REQUIRE(to_f16(value).bits == Eigen::half_impl::float_to_half_rtne(value).x);
    REQUIRE(to_bf16(value).bits ==
            Eigen::bfloat16_impl::float_to_bfloat16_rtne<false>(value).value);
  }
  CHECK(to_f16(65519.0f).bits == 0x7bff);
  CHECK(to_f16(65520.0f).bits == 0x7c00);
  CHECK(to_f16(0x1p-25f).bits == 0);
  CHECK(to_f16(0x1.8p-24f).bits == 2);
  CHECK(to_bf16(std::numeric_limits<float>::max()).bits == 0x7f80);
}

}  // namespace
}  // namespace sida
