// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "sida/backend/cpu/isa.hpp"
#include "sida/core/half.hpp"
#include "sida/core/moe_config.hpp"

// Activations on vectors of the compiler's (GCC's and Clang's vector extension), so that one text
// serves every instruction set: the bodies are inlined into functions with the set's target.
// Vectors go by reference, since passing them by value would depend on the target.
#define SIDA_INLINE inline __attribute__((always_inline))

namespace sida::detail {

template <int Lanes>
struct Vectors {
  typedef float Float __attribute__((vector_size(Lanes * 4)));
  typedef std::uint32_t Unsigned __attribute__((vector_size(Lanes * 4)));
  typedef std::uint16_t Short __attribute__((vector_size(Lanes * 2)));
};

inline constexpr float swiglu_alpha = 1.702f;

/// x = e^x to 2 units in the last place, with x cut to [-87, 88]; a NaN stays one.
template <int Lanes>
SIDA_INLINE void exponential(typename Vectors<Lanes>::Float& x) {
  using Float = typename Vectors<Lanes>::Float;
  using Unsigned = typename Vectors<Lanes>::Unsigned;
  x = x < -87.0f ? Float{} - 87.0f : x;
  x = x > 88.0f ? Float{} + 88.0f : x;
  // x = n ln 2 + r: adding 1.5 * 2^23 leaves the rounded n in the low bits.
  constexpr float round = 0x1.8p23f;
  const Float shifted = x * 1.44269504f + round;
  Unsigned exponent;
  std::memcpy(&exponent, &shifted, sizeof(exponent));
  exponent = (exponent - std::bit_cast<std::uint32_t>(round) + 127u) << 23;
  Float scale;
  std::memcpy(&scale, &exponent, sizeof(scale));
  const Float n = shifted - round;
  const Float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  const Float series =
      ((((r * (1.0f / 720) + 1.0f / 120) * r + 1.0f / 24) * r + 1.0f / 6) * r + 0.5f) * r * r;
  x = (series + r + 1.0f) * scale;
}

/// x = x / (1 + e^-(2u)) = x (1 + tanh u) / 2; with u = x / 2 that is silu.
template <int Lanes>
SIDA_INLINE void times_logistic(typename Vectors<Lanes>::Float& x,
                                const typename Vectors<Lanes>::Float& twice_u) {
  typename Vectors<Lanes>::Float e = -twice_u;
  exponential<Lanes>(e);
  x = x / (e + 1.0f);
}

/// x = x Φ(x), by erfc(z) = t P(t) e^(-z²) with t = 1 / (1 + z / 2), z >= 0; the relative error of
/// P, fitted on [0, 10], is 5e-8.
template <int Lanes>
SIDA_INLINE void gelu_erf(typename Vectors<Lanes>::Float& x) {
  using Float = typename Vectors<Lanes>::Float;
  constexpr float p[] = {0.28208643f,  0.28237525f,  0.24310422f, 0.20268527f,  -0.026622323f,
                         0.278062791f, -0.48719636f, 0.28457332f, -0.059068616f};
  const Float z = (x < 0.0f ? -x : x) * 0.70710678f;
  const Float t = 1.0f / (z * 0.5f + 1.0f);
  Float e = -(z * z);
  exponential<Lanes>(e);
  Float sum = t * p[8];
  for (int i = 7; i >= 0; --i) sum = (sum + p[i]) * (i ? t : t * 0.5f);
  const Float tail = sum * e;  // Φ(-|x|)
  x = x * (x < 0.0f ? tail : 1.0f - tail);
}

template <int Lanes>
SIDA_INLINE void apply(Activation activation, typename Vectors<Lanes>::Float& x) {
  using Float = typename Vectors<Lanes>::Float;
  switch (activation) {
    case Activation::relu:
      x = x < 0.0f ? Float{} : x;
      return;
    case Activation::relu2:
      x = x < 0.0f ? Float{} : x * x;
      return;
    case Activation::gelu:
      return gelu_erf<Lanes>(x);
    case Activation::gelu_tanh:
      return times_logistic<Lanes>(x, x * (x * x * 0.044715f + 1.0f) * 1.59576912f);
    case Activation::silu:
    case Activation::silu_clamped:
      return times_logistic<Lanes>(x, x);
    case Activation::swiglu_clamped:
      return times_logistic<Lanes>(x, x * swiglu_alpha);
  }
}

/// What clamped activations do to gate and up before the gate is activated.
template <int Lanes>
SIDA_INLINE void clamp_gate_and_up(typename Vectors<Lanes>::Float& gate,
                                   typename Vectors<Lanes>::Float& up, float limit) {
  using Float = typename Vectors<Lanes>::Float;
  gate = gate > limit ? Float{} + limit : gate;
  up = up > limit ? Float{} + limit : up;
  up = up < -limit ? Float{} - limit : up;
}

template <int Lanes>
SIDA_INLINE void store_as(float* to, const typename Vectors<Lanes>::Float& x) {
  std::memcpy(to, &x, sizeof(x));
}
template <int Lanes>
SIDA_INLINE void store_as(BFloat16* to, const typename Vectors<Lanes>::Float& x) {
  using Unsigned = typename Vectors<Lanes>::Unsigned;
  Unsigned bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const Unsigned rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const Unsigned cut = bits >> 16 | 0x40u;
  const Unsigned chosen = (bits & 0x7fffffffu) > 0x7f800000u ? cut : rounded;  // a NaN stays one
  const auto narrow = __builtin_convertvector(chosen, typename Vectors<Lanes>::Short);
  std::memcpy(static_cast<void*>(to), &narrow, sizeof(narrow));
}

/// h = act(values), or with `up` act(values) * up, for `count` elements, a multiple of 16; `limit`
/// is MoeConfig's.
template <int Lanes, class Input>
SIDA_INLINE void activate_all(Activation activation, float limit, const float* values,
                              const float* up, Input* h, std::int64_t count) {
  typename Vectors<Lanes>::Float x, factor{};
  for (std::int64_t i = 0; i < count; i += Lanes) {
    std::memcpy(&x, values + i, sizeof(x));
    if (up) std::memcpy(&factor, up + i, sizeof(factor));
    if (up && is_clamped(activation)) clamp_gate_and_up<Lanes>(x, factor, limit);
    if (activation == Activation::swiglu_clamped) factor = factor + 1.0f;
    apply<Lanes>(activation, x);
    if (up) x = x * factor;
    store_as<Lanes>(h + i, x);
  }
}

/// h = act(values), or with `up` act(values) * up, for `count` elements rounded up to 16.
template <class Input, class Real>
using ActivateFunction = void (*)(Activation, float limit, const Real* values, const Real* up,
                                  Input* h, std::int64_t count);

inline void activate_portable(Activation activation, float limit, const float* values,
                              const float* up, float* h, std::int64_t count) {
  activate_all<4>(activation, limit, values, up, h, count);
}
#if SIDA_X86_KERNELS
SIDA_TARGET_AVX2 inline void activate_avx2(Activation activation, float limit, const float* values,
                                           const float* up, float* h, std::int64_t count) {
  activate_all<8>(activation, limit, values, up, h, count);
}
template <class Input>
SIDA_TARGET_AVX512 void activate_avx512(Activation activation, float limit, const float* values,
                                        const float* up, Input* h, std::int64_t count) {
  activate_all<16>(activation, limit, values, up, h, count);
}
#endif

inline double activated(Activation activation, double x) {
  switch (activation) {
    case Activation::relu:
      return x < 0 ? 0 : x;
    case Activation::relu2:
      return x < 0 ? 0 : x * x;
    case Activation::gelu:
      return 0.5 * x * std::erfc(-x * 0.70710678118654752440);
    case Activation::gelu_tanh:
      return 0.5 * x * (1 + std::tanh(0.79788456080286535588 * (x + 0.044715 * x * x * x)));
    case Activation::silu:
    case Activation::silu_clamped:
      return x / (1 + std::exp(-x));
    case Activation::swiglu_clamped:
      return x / (1 + std::exp(-1.702 * x));
  }
  return x;
}
/// The f64 path, with the C library's functions.
inline void activate_f64(Activation activation, float limit, const double* values, const double* up,
                         double* h, std::int64_t count) {
  const double most = limit;
  for (std::int64_t i = 0; i < count; ++i) {
    double value = values[i], factor = up ? up[i] : 1;
    if (up && is_clamped(activation)) {
      value = value > most ? most : value;
      factor = factor > most ? most : factor < -most ? -most : factor;
    }
    if (activation == Activation::swiglu_clamped) factor += 1;
    h[i] = activated(activation, value) * factor;
  }
}

}  // namespace sida::detail

#undef SIDA_INLINE
