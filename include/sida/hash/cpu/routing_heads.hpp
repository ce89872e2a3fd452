// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <span>
#include <vector>

#include "sida/hash/cpu/predictor_math.hpp"
#include "sida/hash/hash_table.hpp"

namespace sida::detail {

/// Turns logits into probabilities, in place. @returns whether they are all finite.
inline bool softmax(std::span<float> logits) {
  Eigen::Map<Eigen::ArrayXf> values(logits.data(), static_cast<Eigen::Index>(logits.size()));
  values = (values - values.maxCoeff()).exp();
  const float sum = values.sum();
  values /= sum;
  return std::isfinite(sum);
}

/// The `ids.size()` most probable experts, falling, lower ids first among equals.
inline void likeliest(std::span<const float> probs, std::span<std::int32_t> ids) {
  std::size_t found = 0;
  for (std::size_t expert = 0; expert < probs.size(); ++expert) {
    const auto prob = [&](std::size_t place) {
      return probs[static_cast<std::size_t>(ids[place])];
    };
    if (found == ids.size() && probs[expert] <= prob(found - 1)) continue;
    std::size_t place = found < ids.size() ? found++ : found - 1;
    for (; place > 0 && probs[expert] > prob(place - 1); --place) ids[place] = ids[place - 1];
    ids[place] = static_cast<std::int32_t>(expert);
  }
}

/// The heads of all kinds: for every predicted layer a linear map to expert probabilities and one,
/// with a sigmoid, to scales.
class RoutingHeads {
 public:
  RoutingHeads(TensorReader& tensors, const PredictorWeights& weights)
      : weights_(weights),
        routing_(tensors.linear("routing", outputs(weights), weights.hidden_size)),
        scale_(tensors.linear("scale", outputs(weights), weights.hidden_size)) {}

  /// Fills the table's rows tokens[i] from hidden states [rows, H]. Thread-safe.
  void fill(const Matrix& hidden, std::span<const std::int64_t> tokens, HashTable& table) const {
    constexpr Eigen::Index block = 256;  // bounds the logits that are kept
    for (Eigen::Index first = 0; first < hidden.rows(); first += block) {
      const Matrix rows = hidden.middleRows(first, std::min(block, hidden.rows() - first));
      Matrix logits = routing_(rows);
      for (Eigen::Index i = 0; i < rows.rows(); ++i) {
        const std::int64_t token = tokens[static_cast<std::size_t>(first + i)];
        for (std::size_t head = 0; head < weights_.heads.size(); ++head)
          fill_one(rows.row(i), head, logits.row(i).data(),
                   table.index(weights_.heads[head], token, 0), table);
      }
    }
  }

 private:
  static std::int64_t outputs(const PredictorWeights& weights) {
    return static_cast<std::int64_t>(weights.heads.size()) * weights.experts;
  }

  template <class HiddenRow>
  void fill_one(const HiddenRow& hidden, std::size_t head, float* logits, std::size_t at,
                HashTable& table) const {
    const auto experts = static_cast<std::size_t>(weights_.experts);
    const auto count = static_cast<std::size_t>(table.candidates);
    const std::span<float> probs(logits + head * experts, experts);
    const std::span<std::int32_t> ids(table.ids.data() + at, count);
    if (!softmax(probs)) {
      // As the model itself would, NaN embeddings give NaN outputs; nothing is fetched for them.
      std::iota(ids.begin(), ids.end(), 0);
      std::fill_n(table.scale.begin() + static_cast<std::ptrdiff_t>(at), count,
                  std::numeric_limits<float>::quiet_NaN());
      return;
    }
    likeliest(probs, ids);
    for (std::size_t c = 0; c < count; ++c) {
      const auto expert = static_cast<std::size_t>(ids[c]);
      const auto row = static_cast<Eigen::Index>(head * experts + expert);
      const float logit = scale_.weight.row(row).dot(hidden) + scale_.bias(row);
      table.probs[at + c] = probs[expert];
      table.scale[at + c] = weights_.scale_factor / (1.0f + std::exp(-logit));
    }
  }

  const PredictorWeights& weights_;
  Linear routing_;
  Linear scale_;
};

}  // namespace sida::detail
