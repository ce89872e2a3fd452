// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <span>
#include <vector>

#include "sida/hash/cpu/predictor_math.hpp"

namespace sida::detail {

/// Projects `row` onto the simplex, in place (sparsemax; Martins & Astudillo 2016, algorithm 1).
/// A row with an element that is not finite becomes NaN throughout. `scratch` is overwritten.
inline void sparsemax(std::span<float> row, std::vector<float>& scratch) {
  float largest = -std::numeric_limits<float>::infinity();
  bool finite = true;
  for (const float z : row) {
    finite = finite && std::isfinite(z);
    largest = std::max(largest, z);
  }
  if (!finite) {
    std::fill(row.begin(), row.end(), std::numeric_limits<float>::quiet_NaN());
    return;
  }
  // The threshold lies less than 1 below the largest element: few elements matter.
  scratch.clear();
  for (const float z : row)
    if (z - largest > -1.0f) scratch.push_back(z - largest);
  std::sort(scratch.begin(), scratch.end(), std::greater<>());
  double sum = -1.0;
  double threshold = -1.0;
  for (std::size_t k = 0; k < scratch.size(); ++k) {
    sum += scratch[k];
    const double next = sum / static_cast<double>(k + 1);
    if (scratch[k] <= next) break;
    threshold = next;
  }
  for (float& z : row)
    z = std::max(0.0f, static_cast<float>(static_cast<double>(z - largest) - threshold));
}

/// Adds to each row of `out` the sparsemax self-attention over `states` (both [length, H]):
/// out_i += Σ_j sparsemax_j(states_i · states_j) states_j.
template <class Out, class States>
void add_sparse_attention(const Multiplier& multiply, const States& states, Out&& out) {
  constexpr Eigen::Index block = 128;  // bounds the scores that are kept, at any length
  std::vector<float> scratch;
  Matrix scores;
  for (Eigen::Index first = 0; first < states.rows(); first += block) {
    const Eigen::Index rows = std::min(block, states.rows() - first);
    scores.resize(rows, states.rows());
    multiply(states.middleRows(first, rows), states, scores);
    for (Eigen::Index i = 0; i < rows; ++i) {
      sparsemax({scores.row(i).data(), static_cast<std::size_t>(scores.cols())}, scratch);
      for (Eigen::Index j = 0; j < states.rows(); ++j)
        if (scores(i, j) != 0.0f) out.row(first + i) += scores(i, j) * states.row(j);
    }
  }
}

}  // namespace sida::detail
