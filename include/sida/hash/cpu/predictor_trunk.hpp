// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "sida/hash/cpu/predictor_math.hpp"

namespace sida::detail {

/// What a trunk says of tokens, and what it keeps of them for those that follow.
struct Advanced {
  Matrix hidden;  ///< [rows, H]
  Matrix states;  ///< [rows, state_size()]
};

/// What differs between the kinds of predictor: everything between embeddings and heads.
class PredictorTrunk {
 public:
  virtual ~PredictorTrunk() = default;

  /// Hidden states [rows, H] of embeddings [rows, D]. Thread-safe.
  virtual Matrix operator()(const Matrix& embeddings, const Sentences& sentences) const = 0;

  /// Floats that are kept of each token; 0: what is said of a token depends on it alone.
  virtual Eigen::Index state_size() const noexcept { return 0; }
  /// As operator() for sentences whose earlier tokens left the states `past`, [tokens,
  /// state_size()] for each sentence. For causal kinds. Thread-safe.
  virtual Advanced advance(const Matrix& embeddings, const Sentences& sentences,
                           const std::vector<Matrix>& /*past*/) const {
    return {(*this)(embeddings, sentences), Matrix(embeddings.rows(), 0)};
  }
};

/// Kind "token": relu(compress(x)) of each token alone.
class TokenTrunk final : public PredictorTrunk {
 public:
  TokenTrunk(TensorReader& tensors, const PredictorWeights& weights)
      : compress_(tensors.linear("compress", weights.hidden_size, weights.embedding_size)) {}

  Matrix operator()(const Matrix& embeddings, const Sentences&) const override {
    return relu(compress_(embeddings));
  }

 private:
  Linear compress_;
};

}  // namespace sida::detail
