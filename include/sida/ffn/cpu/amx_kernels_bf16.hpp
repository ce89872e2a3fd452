// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "sida/backend/cpu/isa.hpp"

#if SIDA_X86_KERNELS
#include <immintrin.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "sida/backend/cpu/dot_panel.hpp"
#include "sida/core/half.hpp"
#include "sida/ffn/cpu/packed_rows.hpp"

// bf16 inputs against bf16 weights on AMX's tiles. 16 weight rows are the first operand as they lie
// in memory, 32 columns at a time; up to 16 input rows, packed once a call, are the second. A sum
// is added up along the depth, 32 elements at a time, whatever stands beside it in the tile.
// GCC 12 takes the deliberately undefined operands inside its own intrinsics for mistakes
// (PR105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace sida::detail::amx_bf16 {

inline constexpr std::int64_t tile_rows = 16;     // weight rows of a tile
inline constexpr std::int64_t tile_columns = 32;  // elements of a weight row in a tile

/// v[i] lane j becomes v[j] lane i.
SIDA_TARGET_AMX_BF16 inline void transpose(__m512i (&v)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // quarter q of v[i + j] is column 4 q + j of rows i to i + 3
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {  // a 4 x 4 transposition of quarters
    t[j] = _mm512_shuffle_i32x4(v[j], v[4 + j], 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0x88);
    t[8 + j] = _mm512_shuffle_i32x4(v[j], v[4 + j], 0xdd);
    t[12 + j] = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0xdd);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    v[j] = _mm512_shuffle_i32x4(t[j], t[4 + j], 0x88);
    v[8 + j] = _mm512_shuffle_i32x4(t[j], t[4 + j], 0xdd);
    v[4 + j] = _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0x88);
    v[12 + j] = _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0xdd);
  }
}

/// See PackFunction.
SIDA_TARGET_AMX_BF16 inline void pack(const BFloat16* const* rows, std::int64_t count,
                                      std::int64_t columns, BFloat16* to) {
  const auto present = static_cast<__mmask16>((1u << count) - 1u);
  for (std::int64_t column = 0; column < columns; column += tile_columns) {
    __m512i pairs[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r)
      pairs[r] = r < count ? _mm512_loadu_si512(rows[r] + column) : _mm512_setzero_si512();
    transpose(pairs);
#pragma GCC unroll 16
    for (int p = 0; p < 16; ++p)
      _mm512_mask_storeu_epi32(to + (column + 2 * p) * count, present, pairs[p]);
  }
}

/// out[r][n] = from[n][r] for 16 n and `count` rows r.
SIDA_TARGET_AMX_BF16 inline void store_transposed(const float* from, std::int64_t count, float* out,
                                                  std::int64_t out_stride) {
  const auto present = static_cast<__mmask16>((1u << count) - 1u);
  __m512i sums[16];
#pragma GCC unroll 16
  for (int n = 0; n < 16; ++n) sums[n] = _mm512_maskz_loadu_epi32(present, from + n * count);
  transpose(sums);
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r)
    if (r < count) _mm512_storeu_si512(out + r * out_stride, sums[r]);
}

/// What LDTILECFG reads.
struct alignas(64) TileConfig {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
};

/// Sets the thread's tiles: 0 and 1 sums of the first group with the two weight tiles, 2 and 3 of
/// the second; 4 and 5 weights; 6 and 7 inputs. `first`, `second`: rows in the groups.
SIDA_TARGET_AMX_BF16 inline void configure(std::int64_t first, std::int64_t second) {
  TileConfig config;
  const std::int64_t widths[8] = {first, first, second, second, 16, 16, first, second};
  for (int tile = 0; tile < 8; ++tile) {
    config.rows[tile] = tile_rows;
    config.row_bytes[tile] = static_cast<std::uint16_t>(4 * widths[tile]);
  }
  _tile_loadconfig(&config);
  __asm__ volatile("" ::: "memory");
}

/// Where a tile's rows begin and how many bytes lie between them.
struct TileSource {
  const void* data;
  std::int64_t stride;
};

/// 32 weight rows of a product, of which the first `present` exist.
struct WeightTiles {
  const std::byte* data;
  std::int64_t row_bytes;
  std::int64_t depth;
  std::int64_t present;

  /// Rows [16 half, 16 half + 16), columns [column, column + 32). What does not exist is not read
  /// and counts as zero: such a tile is made in `spare`.
  SIDA_TARGET_AMX_BF16 TileSource tile(std::int64_t half, std::int64_t column,
                                       BFloat16 (&spare)[tile_rows * tile_columns]) const {
    const std::byte* from = data + half * tile_rows * row_bytes + column * 2;
    const std::int64_t rows = present - half * tile_rows, columns = depth - column;
    if (rows >= tile_rows && columns >= tile_columns) return {from, row_bytes};
    const auto mask = columns >= tile_columns
                          ? ~__mmask32{0}
                          : static_cast<__mmask32>((std::uint32_t{1} << columns) - 1u);
    for (std::int64_t r = 0; r < tile_rows; ++r) {
      const __m512i row =
          r < rows ? _mm512_maskz_loadu_epi16(mask, from + r * row_bytes) : _mm512_setzero_si512();
      _mm512_storeu_si512(spare + r * tile_columns, row);
    }
    __asm__ volatile("" ::: "memory");  // GCC's tile loads do not say that they read memory
    return {spare, 2 * tile_columns};
  }
};

/// The sums of 32 weight rows with one or two groups of rows.
template <int Groups>
SIDA_TARGET_AMX_BF16 void multiply_groups(const WeightTiles& weights, const BFloat16* packed,
                                          std::int64_t padded_depth, std::int64_t first,
                                          std::int64_t second, float* out,
                                          std::int64_t out_stride) {
  configure(first, Groups == 2 ? second : tile_rows);
  alignas(64) BFloat16 spare[tile_rows * tile_columns];
  const BFloat16* second_packed = packed + first * padded_depth;
  _tile_zero(0);
  _tile_zero(1);
  if (Groups == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (std::int64_t column = 0; column < weights.depth; column += tile_columns) {
    _tile_loadd(6, packed + column * first, 4 * first);
    const TileSource upper = weights.tile(0, column, spare);
    _tile_loadd(4, upper.data, upper.stride);
    _tile_dpbf16ps(0, 4, 6);
    const TileSource lower = weights.tile(1, column, spare);
    _tile_loadd(5, lower.data, lower.stride);
    _tile_dpbf16ps(1, 5, 6);
    if (Groups == 2) {
      _tile_loadd(7, second_packed + column * second, 4 * second);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  alignas(64) float sums[4][tile_rows * packed_rows];
  _tile_stored(0, sums[0], 4 * first);
  _tile_stored(1, sums[1], 4 * first);
  store_transposed(sums[0], first, out, out_stride);
  store_transposed(sums[1], first, out + tile_rows, out_stride);
  if (Groups == 2) {
    _tile_stored(2, sums[2], 4 * second);
    _tile_stored(3, sums[3], 4 * second);
    out += first * out_stride;
    store_transposed(sums[2], second, out, out_stride);
    store_transposed(sums[3], second, out + tile_rows, out_stride);
  }
}

/// Weights and packed inputs of bf16, accumulated in f32. `outputs` and `out_stride` are at most
/// and exactly 32 * n.
SIDA_TARGET_AMX_BF16 inline void multiply(const Product<BFloat16, float>& product) {
  const std::int64_t padded = (product.depth + input_padding - 1) / input_padding * input_padding;
  for (std::int64_t n = 0; n < product.outputs; n += 2 * tile_rows) {
    const WeightTiles weights{product.weights + n * product.row_bytes, product.row_bytes,
                              product.depth, product.outputs - n};
    for (std::int64_t row = 0; row < product.rows; row += 2 * packed_rows) {
      const BFloat16* packed = product.packed + row * padded;
      const std::int64_t left = product.rows - row;
      const std::int64_t first = std::min(left, packed_rows);
      const std::int64_t second = std::min(left - first, packed_rows);
      float* out = product.out + row * product.out_stride + n;
      if (second > 0)
        multiply_groups<2>(weights, packed, padded, first, second, out, product.out_stride);
      else
        multiply_groups<1>(weights, packed, padded, first, 0, out, product.out_stride);
    }
  }
  _tile_release();
}

}  // namespace sida::detail::amx_bf16

#pragma GCC diagnostic pop
#endif
