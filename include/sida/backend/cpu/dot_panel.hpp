// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace sida::detail {

/// The innermost piece of `out = inputs · weightsᵀ`: a few input rows against four weight rows over
/// `depth` elements of the contracted dimension.
///
/// Every output is accumulated in an order that depends on `depth` alone: one set of lanes walks
/// along the depth, then the lanes are added in a fixed tree. So a row's bits do not depend on the
/// rows beside it, on how work is divided, or on addresses.
template <class Input, class Real>
struct DotPanel {
  static constexpr int outputs = 4;

  const Input* const* inputs = nullptr;  ///< [rows], each with `first + depth` elements or more
  std::int64_t rows = 0;
  std::int64_t first = 0;               ///< where the piece begins along the inputs
  const std::byte* weights[outputs]{};  ///< four weight rows, each at element `first`
  std::int64_t depth = 0;               ///< elements to contract
  Real* out = nullptr;                  ///< [rows, out_stride]; the first four columns are written
  std::int64_t out_stride = 0;
  bool accumulate = false;   ///< add to `out` instead of setting it
  std::ptrdiff_t ahead = 0;  ///< bytes from each weight row to the one wanted next; 0: none
};

/// Computes one panel. Inputs are padded with zeros to a multiple of `input_padding` elements;
/// weights are never read past the depth.
template <class Input, class Real>
using DotPanelFunction = void (*)(const DotPanel<Input, Real>&);

/// Computes some of a panel's rows, as many as the tile is made for, beginning at `row`.
template <class Input, class Real>
using DotPanelTile = void (*)(const DotPanel<Input, Real>& panel, std::int64_t row);

/// Covers the panel's rows with tiles of 1 to `MaxRows` rows (tiles[i] takes i + 1), as even as can
/// be.
template <class Input, class Real, std::size_t MaxRows>
void for_each_tile(const DotPanel<Input, Real>& panel,
                   const DotPanelTile<Input, Real> (&tiles)[MaxRows]) {
  constexpr auto most = static_cast<std::int64_t>(MaxRows);
  std::int64_t count = (panel.rows + most - 1) / most;
  for (std::int64_t row = 0; count > 0; --count) {
    const std::int64_t rows = (panel.rows - row + count - 1) / count;
    tiles[rows - 1](panel, row);
    row += rows;
  }
}

/// The weight rows, as bits, of which the tile beginning at `row` prefetches the successors. Where
/// there are several tiles of up to `most` rows, the first two take two rows each, so that memory
/// is at work while either computes.
template <class Input, class Real>
unsigned rows_to_prefetch(const DotPanel<Input, Real>& panel, std::int64_t row, std::int64_t most) {
  if (panel.ahead == 0) return 0;
  if (panel.rows <= most) return 0b1111;
  return row == 0 ? 0b0011 : row <= most ? 0b1100 : 0;
}

/// Asks for a line: for the first-level cache if a single tile computes on it soon, for the second
/// if several tiles of inputs fill the first.
inline void prefetch(const std::byte* line, bool soon) noexcept {
  if (soon)
    __builtin_prefetch(line, 0, 3);
  else
    __builtin_prefetch(line, 0, 2);
}

/// Elements that input rows are padded to: the widest kernel's step.
inline constexpr std::int64_t input_padding = 32;

/// Bytes of one input row that a panel walks, so that six inputs and four weight rows fit the
/// first-level cache together.
inline constexpr std::int64_t panel_bytes = 3072;

/// A block of a matrix product: out[r, n] = Σ_k inputs[r][k] * weights[n][k] for all rows and n in
/// [0, outputs).
template <class Input, class Real>
struct Product {
  const Input* const* inputs = nullptr;  ///< [rows], padded with zeros as input_padding says
  const Input* packed = nullptr;         ///< what PackFunction made of them, where a kernel has one
  std::int64_t rows = 0;
  const std::byte* weights = nullptr;  ///< row-major [outputs, depth]
  std::int64_t row_bytes = 0;          ///< from one weight row to the next
  std::int64_t element_bytes = 0;      ///< of one weight
  std::int64_t depth = 0;
  std::int64_t outputs = 0;  ///< at most out_stride less what rounding up to four adds
  Real* out = nullptr;       ///< [rows, out_stride]; columns past the last may be overwritten
  std::int64_t out_stride = 0;
};
template <class Input, class Real>
using MultiplyFunction = void (*)(const Product<Input, Real>& product);

/// Computes a product panel by panel.
template <class Input, class Real, DotPanelFunction<Input, Real> Dot>
void multiply_rows(const Product<Input, Real>& product) {
  constexpr std::int64_t step = panel_bytes / static_cast<std::int64_t>(sizeof(Input));
  constexpr int width = DotPanel<Input, Real>::outputs;
  const std::int64_t row_bytes = product.row_bytes, outputs = product.outputs;
  const std::int64_t element = product.element_bytes;
  DotPanel<Input, Real> panel;
  panel.inputs = product.inputs;
  panel.rows = product.rows;
  panel.out_stride = product.out_stride;
  for (std::int64_t first = 0; first < product.depth; first += step) {
    panel.first = first;
    panel.depth = std::min(step, product.depth - first);
    panel.accumulate = first > 0;
    const std::byte* weights = product.weights + first * element;
    for (std::int64_t n = 0; n < outputs; n += width) {
      for (int i = 0; i < width; ++i)  // the last row stands in for those past the end
        panel.weights[i] = weights + std::min(n + i, outputs - 1) * row_bytes;
      panel.out = product.out + n;
      const bool last = n + width >= outputs;
      if (!last)
        panel.ahead = width * row_bytes;
      else  // the next step's first rows, if there is one
        panel.ahead =
            first + step < product.depth ? weights + step * element - panel.weights[0] : 0;
      Dot(panel);
    }
  }
}

}  // namespace sida::detail
