// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "sida/backend/cpu/isa.hpp"

#if SIDA_X86_KERNELS
#include <immintrin.h>

#include <cstdint>

#include "sida/backend/cpu/dot_panel.hpp"
#include "sida/core/half.hpp"

// Up to six input rows against four weight rows: 24 accumulators, 6 inputs and one weight register.
// A step along the depth takes 10 loads and 24 multiply-adds, so it runs at the rate of the latter.
// GCC 12 takes the deliberately undefined operands inside its own intrinsics for mistakes
// (PR105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace sida::detail::avx512 {

inline constexpr std::int64_t lanes = 16;

SIDA_TARGET_AVX512 inline __mmask16 first_lanes(std::int64_t count) {
  return static_cast<__mmask16>((1u << count) - 1u);
}
SIDA_TARGET_AVX512 inline __m512 load_weights(const float* data) { return _mm512_loadu_ps(data); }
SIDA_TARGET_AVX512 inline __m512 load_weights(const float* data, std::int64_t count) {
  return _mm512_maskz_loadu_ps(first_lanes(count), data);
}
SIDA_TARGET_AVX512 inline __m512 load_weights(const Half* data) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(data)));
}
SIDA_TARGET_AVX512 inline __m512 load_weights(const Half* data, std::int64_t count) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(count), data));
}
SIDA_TARGET_AVX512 inline __m512 widen(__m256i bf16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
}
SIDA_TARGET_AVX512 inline __m512 load_weights(const BFloat16* data) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(data)));
}
SIDA_TARGET_AVX512 inline __m512 load_weights(const BFloat16* data, std::int64_t count) {
  return widen(_mm256_maskz_loadu_epi16(first_lanes(count), data));
}

/// The sums of the lanes of four vectors: within quarters first, then over the quarters.
SIDA_TARGET_AVX512 inline __m128 sum_lanes(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512 quarters = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  const __m256 halves =
      _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
  return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
}

template <int Rows, class Input>
SIDA_TARGET_AVX512 inline void store(const DotPanel<Input, float>& panel, std::int64_t row,
                                     const __m512 (&sums)[Rows][4]) {
#pragma GCC unroll 6
  for (int r = 0; r < Rows; ++r) {
    float* out = panel.out + (row + r) * panel.out_stride;
    const __m128 sum = sum_lanes(sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
    _mm_storeu_ps(out, panel.accumulate ? _mm_add_ps(_mm_loadu_ps(out), sum) : sum);
  }
}

/// Rows [row, row + Rows) of the panel.
template <int Rows, class Weight>
SIDA_TARGET_AVX512 void dot_tile(const DotPanel<float, float>& panel, std::int64_t row) {
  const float* inputs[Rows];
  __m512 sums[Rows][4];
#pragma GCC unroll 6
  for (int r = 0; r < Rows; ++r) {
    inputs[r] = panel.inputs[row + r] + panel.first;
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) sums[r][n] = _mm512_setzero_ps();
  }
  const unsigned fetched = rows_to_prefetch(panel, row, 6);
  const bool soon = panel.rows <= 6;
  const std::int64_t whole = panel.depth / lanes * lanes;
  for (std::int64_t k = 0; k < whole; k += lanes) {
    __m512 x[Rows];
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r) x[r] = _mm512_loadu_ps(inputs[r] + k);
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) {
      const auto* weights = reinterpret_cast<const Weight*>(panel.weights[n]) + k;
      if (fetched >> n & 1u)
        prefetch(reinterpret_cast<const std::byte*>(weights) + panel.ahead, soon);
      const __m512 w = load_weights(weights);
#pragma GCC unroll 6
      for (int r = 0; r < Rows; ++r) sums[r][n] = _mm512_fmadd_ps(x[r], w, sums[r][n]);
    }
  }
  if (whole < panel.depth) {
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) {
      const __m512 w = load_weights(reinterpret_cast<const Weight*>(panel.weights[n]) + whole,
                                    panel.depth - whole);
#pragma GCC unroll 6
      for (int r = 0; r < Rows; ++r)
        sums[r][n] = _mm512_fmadd_ps(_mm512_loadu_ps(inputs[r] + whole), w, sums[r][n]);
    }
  }
  store<Rows>(panel, row, sums);
}

/// Weights of f32, f16 or bf16 against f32 inputs, accumulated in f32.
template <class Weight>
void dot_panel(const DotPanel<float, float>& panel) {
  constexpr DotPanelTile<float, float> tiles[] = {dot_tile<1, Weight>, dot_tile<2, Weight>,
                                                  dot_tile<3, Weight>, dot_tile<4, Weight>,
                                                  dot_tile<5, Weight>, dot_tile<6, Weight>};
  for_each_tile(panel, tiles);
}

}  // namespace sida::detail::avx512

#pragma GCC diagnostic pop
#endif
