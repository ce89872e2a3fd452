// SPDX-License-Identifier: Apache-2.0
#include "sida/ffn/cpu/activation.hpp"

#include <cmath>
#include <limits>
#include <vector>

#include "sida/ffn/cpu/ffn_kernels.hpp"
#include "support/catch.hpp"
#include "support/ffn_call.hpp"
#include "support/reference_ffn.hpp"

namespace sida::test {
namespace {

constexpr Activation activations[] = {Activation::relu, Activation::relu2, Activation::gelu,
                                      Activation::gelu_tanh, Activation::silu};

TEST_CASE("Vectorised activations agree with their definitions everywhere", "[activation]") {
  for (const Isa isa : machine_isas())
    for (const Activation activation : activations) {
      CAPTURE(name_of(isa), name_of(activation));
      const auto activate = detail::f32_kernels(DataType::f32, isa).activate;
      double worst = 0;
      for (int block = -2000; block < 2000; ++block) {
        float x[16], y[16];
        for (int i = 0; i < 16; ++i)
          x[i] = static_cast<float>(block * 16 + i) * (100.0f / 32000);  // [-100, 100]
        activate(activation, 7, x, nullptr, y, 16);
        for (int i = 0; i < 16; ++i) {
          const double expected = reference_activation(activation, static_cast<double>(x[i]));
          // Relative to the input: where the output is far smaller, it no longer counts.
          const double scale =
              std::max(std::abs(static_cast<double>(x[i])), std::abs(expected)) + 1e-30;
          worst = std::max(worst, std::abs(static_cast<double>(y[i]) - expected) / scale);
        }
      }
      CHECK(worst <= 3e-7);
    }
}

TEST_CASE("A gated activation multiplies, NaN passes through, infinities do what they must",
          "[activation]") {
  const float inf = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const Isa isa : machine_isas())
    for (const Activation activation : activations) {
      CAPTURE(name_of(isa), name_of(activation));
      const auto activate = detail::f32_kernels(DataType::f32, isa).activate;
      const float x[16] = {nan, inf, 0, 3, -200, 1e30f}, up[16] = {1, 1, 1, 2, 1, 1};
      float y[16];
      activate(activation, 7, x, up, y, 16);
      CHECK(std::isnan(y[0]));
      CHECK(y[1] == inf);
      CHECK(y[2] == 0);
      CHECK(y[3] == Approx(2 * reference_activation(activation, 3)));
      CHECK(std::abs(y[4]) < 1e-30f);
      CHECK(y[5] == (activation == Activation::relu2 ? inf : 1e30f));
    }
}

TEST_CASE("Clamped activations cut gate and up at the limit, and let NaN through", "[activation]") {
  const float inf = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float gate[16] = {nan, 1, inf, 9, -200, 2, 6.5f, -1},
              up[16] = {1, nan, 1, -12, 1, inf, 7, 0};
  for (const Isa isa : machine_isas())
    for (const float limit : {7.0f, 10.0f})
      for (const Activation activation : {Activation::silu_clamped, Activation::swiglu_clamped}) {
        CAPTURE(name_of(isa), name_of(activation), limit);
        const double most = static_cast<double>(limit);
        const double added = activation == Activation::swiglu_clamped ? 1 : 0;
        const double cut[] = {0, 0, 1, -most, 1, most, 7, 0};
        float y[16];
        detail::f32_kernels(DataType::f32, isa).activate(activation, limit, gate, up, y, 16);
        CHECK(std::isnan(y[0]));
        CHECK(std::isnan(y[1]));
        CHECK(std::abs(y[4]) < 1e-30f);
        for (const int i : {2, 3, 5, 6, 7}) {
          const double activated =
              reference_activation(activation, static_cast<double>(gate[i]), most);
          CHECK(y[i] == Approx((cut[i] + added) * activated));
        }
      }
}

TEST_CASE("bf16 intermediate values are the f32 ones, rounded to the nearest", "[activation]") {
  if (best_isa() < Isa::avx512_bf16) return;
  const auto widened = detail::f32_kernels(DataType::bf16, Isa::avx512_bf16).activate;
  const auto rounded = detail::bf16_kernels(best_isa()).activate;
  for (int block = 0; block < 4096; ++block) {
    float x[16], expected[16];
    BFloat16 got[16];
    for (int i = 0; i < 16; ++i) x[i] = static_cast<float>(block * 16 + i - 32768) * 1e-3f;
    x[7] = block == 0 ? std::numeric_limits<float>::quiet_NaN() : x[7];
    widened(Activation::silu, 7, x, nullptr, expected, 16);
    rounded(Activation::silu, 7, x, nullptr, got, 16);
    for (int i = 0; i < 16; ++i) {
      if (std::isnan(x[i]))
        REQUIRE(std::isnan(to_f32(got[i])));
      else
        REQUIRE(got[i].bits == to_bf16(expected[i]).bits);
    }
  }
}

}  // namespace
}  // namespace sida::test
