// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <Eigen/Core>
#include <cstdint>
#include <cstring>

#include "sida/backend/cpu/dot_panel.hpp"
#include "sida/core/half.hpp"

// The path of every processor, on Eigen's fixed-size arrays, which it vectorises where it can; and
// the only path of f64.
namespace sida::detail::portable {

template <class Real>
using Lanes = Eigen::Array<Real, 8, 1>;

inline double widen(double weight) { return weight; }
inline float widen(float weight) { return weight; }
inline float widen(Half weight) { return to_f32(weight); }
inline float widen(BFloat16 weight) { return to_f32(weight); }

/// The first `count` weights, then zeros; reads nothing past them.
template <class Weight, class Real>
Lanes<Real> load_weights(const std::byte* data, std::int64_t count) {
  Weight weights[8] = {};
  std::memcpy(weights, data, static_cast<std::size_t>(count) * sizeof(Weight));
  Lanes<Real> lanes;
  for (int i = 0; i < 8; ++i) lanes[i] = widen(weights[i]);
  return lanes;
}

/// Rows [row, row + Rows) of the panel.
template <int Rows, class Weight, class Real>
void dot_tile(const DotPanel<Real, Real>& panel, std::int64_t row) {
  Lanes<Real> sums[Rows][4];
  for (auto& of_row : sums)
    for (Lanes<Real>& sum : of_row) sum.setZero();
  for (std::int64_t k = 0; k < panel.depth; k += 8) {
    const std::int64_t count = std::min<std::int64_t>(8, panel.depth - k);
    for (int n = 0; n < 4; ++n) {
      const std::byte* weights = panel.weights[n] + k * static_cast<std::int64_t>(sizeof(Weight));
      const Lanes<Real> w = load_weights<Weight, Real>(weights, count);
      for (int r = 0; r < Rows; ++r)
        sums[r][n] += w * Eigen::Map<const Lanes<Real>>(panel.inputs[row + r] + panel.first + k);
    }
  }
  for (int r = 0; r < Rows; ++r) {
    Real* out = panel.out + (row + r) * panel.out_stride;
    for (int n = 0; n < 4; ++n)
      out[n] = panel.accumulate ? out[n] + sums[r][n].sum() : sums[r][n].sum();
  }
}

/// Weights of any storage type against f32 inputs, accumulated in f32; or all of it in f64.
template <class Weight, class Real>
void dot_panel(const DotPanel<Real, Real>& panel) {
  constexpr DotPanelTile<Real, Real> tiles[] = {dot_tile<1, Weight, Real>,
                                                dot_tile<2, Weight, Real>};
  for_each_tile(panel, tiles);
}

}  // namespace sida::detail::portable
