// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "sida/backend/cpu/isa.hpp"

#if SIDA_X86_KERNELS
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "sida/backend/cpu/dot_panel.hpp"
#include "sida/core/half.hpp"

// Up to three input rows against four weight rows: 12 accumulators, 3 inputs and one weight
// register.
namespace sida::detail::avx2 {

inline constexpr std::int64_t lanes = 8;

SIDA_TARGET_AVX2 inline __m256 load_weights(const float* data) { return _mm256_loadu_ps(data); }
SIDA_TARGET_AVX2 inline __m256 load_weights(const Half* data) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data)));
}
SIDA_TARGET_AVX2 inline __m256 load_weights(const BFloat16* data) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(data));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
/// The first `count` weights, then zeros; reads nothing past them.
template <class Weight>
SIDA_TARGET_AVX2 inline __m256 load_weights(const Weight* data, std::int64_t count) {
  Weight padded[lanes] = {};
  std::memcpy(padded, data, static_cast<std::size_t>(count) * sizeof(Weight));
  return load_weights(padded);
}

/// The sums of the lanes of four vectors: within halves first, then over the halves.
SIDA_TARGET_AVX2 inline __m128 sum_lanes(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256 halves = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
}

/// Rows [row, row + Rows) of the panel.
template <int Rows, class Weight>
SIDA_TARGET_AVX2 void dot_tile(const DotPanel<float, float>& panel, std::int64_t row) {
  const float* inputs[Rows];
  __m256 sums[Rows][4];
#pragma GCC unroll 3
  for (int r = 0; r < Rows; ++r) {
    inputs[r] = panel.inputs[row + r] + panel.first;
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) sums[r][n] = _mm256_setzero_ps();
  }
  const unsigned fetched = rows_to_prefetch(panel, row, 3);
  const bool soon = panel.rows <= 3;
  const std::int64_t whole = panel.depth / lanes * lanes;
  for (std::int64_t k = 0; k < whole; k += lanes) {
    __m256 x[Rows];
#pragma GCC unroll 3
    for (int r = 0; r < Rows; ++r) x[r] = _mm256_loadu_ps(inputs[r] + k);
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) {
      const auto* weights = reinterpret_cast<const Weight*>(panel.weights[n]) + k;
      if (fetched >> n & 1u)
        prefetch(reinterpret_cast<const std::byte*>(weights) + panel.ahead, soon);
      const __m256 w = load_weights(weights);
#pragma GCC unroll 3
      for (int r = 0; r < Rows; ++r) sums[r][n] = _mm256_fmadd_ps(x[r], w, sums[r][n]);
    }
  }
  if (whole < panel.depth) {
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) {
      const __m256 w = load_weights(reinterpret_cast<const Weight*>(panel.weights[n]) + whole,
                                    panel.depth - whole);
#pragma GCC unroll 3
      for (int r = 0; r < Rows; ++r)
        sums[r][n] = _mm256_fmadd_ps(_mm256_loadu_ps(inputs[r] + whole), w, sums[r][n]);
    }
  }
#pragma GCC unroll 3
  for (int r = 0; r < Rows; ++r) {
    float* out = panel.out + (row + r) * panel.out_stride;
    const __m128 sum = sum_lanes(sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
    _mm_storeu_ps(out, panel.accumulate ? _mm_add_ps(_mm_loadu_ps(out), sum) : sum);
  }
}

/// Weights of f32, f16 or bf16 against f32 inputs, accumulated in f32.
template <class Weight>
void dot_panel(const DotPanel<float, float>& panel) {
  constexpr DotPanelTile<float, float> tiles[] = {dot_tile<1, Weight>, dot_tile<2, Weight>,
                                                  dot_tile<3, Weight>};
  for_each_tile(panel, tiles);
}

}  // namespace sida::detail::avx2
#endif
