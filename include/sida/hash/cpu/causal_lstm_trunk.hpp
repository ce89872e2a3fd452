// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "sida/hash/cpu/lstm_trunk.hpp"

namespace sida::detail {

/// Kind "causal_lstm", for decoders: as "lstm", but a token attends to itself and to those before
/// it, so that what is said of a token does not change when others follow.
///
/// Its state for a token is [first layer's output and cell; second layer's output and cell]: from
/// the latest token's both layers go on, and all of the second layer's outputs are attended to.
class CausalLstmTrunk final : public PredictorTrunk {
 public:
  CausalLstmTrunk(TensorReader& tensors, const PredictorWeights& weights)
      : compress_(tensors.linear("compress", weights.hidden_size, weights.embedding_size)),
        first_(tensors, "_l0", weights.hidden_size),
        second_(tensors, "_l1", weights.hidden_size),
        residual_(tensors.linear("residual", weights.hidden_size, weights.hidden_size)) {}

  Eigen::Index state_size() const noexcept override { return 4 * residual_.weight.rows(); }

  Matrix operator()(const Matrix& embeddings, const Sentences& sentences) const override {
    const std::vector<Matrix> nothing(sentences.count(), Matrix(0, state_size()));
    return advance(embeddings, sentences, nothing).hidden;
  }

  Advanced advance(const Matrix& embeddings, const Sentences& sentences,
                   const std::vector<Matrix>& past) const override {
    const Eigen::Index size = residual_.weight.rows();
    const Matrix compressed = relu(compress_(embeddings));
    const LstmSteps first = first_.run(compressed, sentences, latest(past, 0));
    const LstmSteps second = second_.run(first.output, sentences, latest(past, 2 * size));
    Advanced advanced{residual_(compressed), Matrix(embeddings.rows(), state_size())};
    advanced.states << first.output, first.cell, second.output, second.cell;
    for (std::size_t s = 0; s < sentences.count(); ++s) {
      Matrix seen(past[s].rows() + sentences.length(s), size);
      seen.topRows(past[s].rows()) = past[s].middleCols(2 * size, size);
      seen.bottomRows(sentences.length(s)) =
          second.output.middleRows(sentences.begin(s), sentences.length(s));
      attend(seen, advanced.hidden.middleRows(sentences.begin(s), sentences.length(s)));
    }
    return advanced;
  }

 private:
  /// What a layer goes on from: output and cell of each sentence's latest token, or zeros.
  LstmSteps latest(const std::vector<Matrix>& past, Eigen::Index column) const {
    const Eigen::Index size = residual_.weight.rows();
    const auto count = static_cast<Eigen::Index>(past.size());
    LstmSteps state{Matrix::Zero(count, size), Matrix::Zero(count, size)};
    for (Eigen::Index s = 0; s < count; ++s) {
      const Matrix& earlier = past[static_cast<std::size_t>(s)];
      if (earlier.rows() == 0) continue;
      const auto last = earlier.row(earlier.rows() - 1);
      state.output.row(s) = last.segment(column, size);
      state.cell.row(s) = last.segment(column + size, size);
    }
    return state;
  }

  /// Adds to each row of `out`, those of the latest tokens, what it attends to in `seen`.
  template <class Out>
  void attend(const Matrix& seen, Out&& out) const {
    std::vector<float> scratch;
    Matrix scores;
    for (Eigen::Index i = 0; i < out.rows(); ++i) {
      const Eigen::Index count = seen.rows() - out.rows() + i + 1;
      scores.resize(1, count);
      residual_.multiply(seen.middleRows(count - 1, 1), seen.topRows(count), scores);
      sparsemax({scores.data(), static_cast<std::size_t>(count)}, scratch);
      for (Eigen::Index j = 0; j < count; ++j)
        if (scores(0, j) != 0.0f) out.row(i) += scores(0, j) * seen.row(j);
    }
  }

  Linear compress_;
  LstmLayer first_;
  LstmLayer second_;
  Linear residual_;
};

}  // namespace sida::detail
