// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "sida/backend/cpu/isa.hpp"

#if SIDA_X86_KERNELS
#include <immintrin.h>

#include <cstdint>

#include "sida/backend/cpu/dot_kernels_avx512.hpp"
#include "sida/backend/cpu/dot_panel.hpp"
#include "sida/core/half.hpp"

// bf16 inputs against bf16 weights: vdpbf16ps multiplies pairs along the depth and adds them in
// f32.
// GCC 12 takes the deliberately undefined operands inside its own intrinsics for mistakes
// (PR105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace sida::detail::avx512_bf16 {

inline constexpr std::int64_t lanes = 32;

SIDA_TARGET_AVX512_BF16 inline __m512bh load(const void* data) {
  return (__m512bh)_mm512_loadu_si512(data);
}
SIDA_TARGET_AVX512_BF16 inline __m512bh load(const void* data, std::int64_t count) {
  const auto first_lanes = static_cast<__mmask32>((1u << count) - 1u);
  return (__m512bh)_mm512_maskz_loadu_epi16(first_lanes, data);
}

/// Rows [row, row + Rows) of the panel.
template <int Rows>
SIDA_TARGET_AVX512_BF16 void dot_tile(const DotPanel<BFloat16, float>& panel, std::int64_t row) {
  const BFloat16* inputs[Rows];
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
    __m512bh x[Rows];
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r) x[r] = load(inputs[r] + k);
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) {
      const auto* weights = reinterpret_cast<const BFloat16*>(panel.weights[n]) + k;
      if (fetched >> n & 1u)
        prefetch(reinterpret_cast<const std::byte*>(weights) + panel.ahead, soon);
      const __m512bh w = load(weights);
#pragma GCC unroll 6
      for (int r = 0; r < Rows; ++r) sums[r][n] = _mm512_dpbf16_ps(sums[r][n], x[r], w);
    }
  }
  if (whole < panel.depth) {
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) {
      const __m512bh w =
          load(reinterpret_cast<const BFloat16*>(panel.weights[n]) + whole, panel.depth - whole);
#pragma GCC unroll 6
      for (int r = 0; r < Rows; ++r)
        sums[r][n] = _mm512_dpbf16_ps(sums[r][n], load(inputs[r] + whole), w);
    }
  }
  avx512::store<Rows>(panel, row, sums);
}

/// Weights and inputs of bf16, accumulated in f32.
inline void dot_panel(const DotPanel<BFloat16, float>& panel) {
  constexpr DotPanelTile<BFloat16, float> tiles[] = {dot_tile<1>, dot_tile<2>, dot_tile<3>,
                                                     dot_tile<4>, dot_tile<5>, dot_tile<6>};
  for_each_tile(panel, tiles);
}

}  // namespace sida::detail::avx512_bf16

#pragma GCC diagnostic pop
#endif
