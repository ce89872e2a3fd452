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

/// Elements that input rows are padded to: the widest kernel's step.
inline constexpr std::int64_t input_padding = 32;

/// Bytes of one input row that a panel walks, so that six inputs and four weight rows fit the
/// first-level cache together.
inline constexpr std::int64_t panel_bytes = 3072;

/// out[r, n] = Σ_k inputs[r][k] * weights[n][k] for all rows and n in [0, outputs). `weights` is
/// row-major, `row_bytes` a row. Columns of `out` up to the next multiple of four are overwritten.
template <class Input, class Real>
void multiply_rows(DotPanelFunction<Input, Real> dot, const Input* const* inputs, std::int64_t rows,
                   const std::byte* weights, std::int64_t row_bytes, std::int64_t depth,
                   std::int64_t outputs, Real* out, std::int64_t out_stride) {
  constexpr std::int64_t step = panel_bytes / static_cast<std::int64_t>(sizeof(Input));
  constexpr int width = DotPanel<Input, Real>::outputs;
  const std::int64_t element = row_bytes / depth;
  DotPanel<Input, Real> panel;
  panel.inputs = inputs;
  panel.rows = rows;
  panel.out_stride = out_stride;
  for (std::int64_t first = 0; first < depth; first += step) {
    panel.first = first;
    panel.depth = std::min(step, depth - first);
    panel.accumulate = first > 0;
    for (std::int64_t n = 0; n < outputs; n += width) {
      for (int i = 0; i < width; ++i)  // the last row stands in for those past the end
        panel.weights[i] = weights + std::min(n + i, outputs - 1) * row_bytes + first * element;
      panel.out = out + n;
      panel.ahead = n + width < outputs ? width * row_bytes : 0;
      dot(panel);
    }
  }
}

}  // namespace sida::detail
