// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "sida/hash/cpu/predictor_math.hpp"

namespace sida::detail {

/// What differs between the kinds of predictor: everything between embeddings and heads.
class PredictorTrunk {
 public:
  virtual ~PredictorTrunk() = default;

  /// Hidden states [rows, H] of embeddings [rows, D]. Thread-safe.
  virtual Matrix operator()(const Matrix& embeddings, const Sentences& sentences) const = 0;
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
