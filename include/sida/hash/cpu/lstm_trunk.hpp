// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#include "sida/hash/cpu/predictor_trunk.hpp"
#include "sida/hash/cpu/sparse_attention.hpp"

namespace sida::detail {

/// What an LSTM layer computed, step by step, or from where it goes on.
struct LstmSteps {
  Matrix output;
  Matrix cell;
};

/// One LSTM layer, PyTorch's gate order (input, forget, cell, output).
class LstmLayer {
 public:
  LstmLayer(TensorReader& tensors, const std::string& suffix, std::int64_t size)
      : input_{tensors.matrix("lstm.weight_ih" + suffix, 4 * size, size),
               tensors.row("lstm.bias_ih" + suffix, 4 * size), tensors.multiplier()},
        recurrent_(tensors.matrix("lstm.weight_hh" + suffix, 4 * size, size)),
        recurrent_bias_(tensors.row("lstm.bias_hh" + suffix, 4 * size)) {}

  /// Outputs [rows, H] for inputs [rows, H]. All that does not depend on the step before is one
  /// product over all rows; what does is one product a step, over the sentences still running.
  Matrix operator()(const Matrix& inputs, const Sentences& sentences) const {
    const auto count = static_cast<Eigen::Index>(sentences.count());
    const Matrix zeros = Matrix::Zero(count, inputs.cols());
    return run(inputs, sentences, {zeros, zeros}).output;
  }

  /// The same from where each sentence, a row of `begin`, has got to.
  LstmSteps run(const Matrix& inputs, const Sentences& sentences, const LstmSteps& begin) const {
    const Eigen::Index size = inputs.cols();
    Matrix gates = input_(inputs);
    gates.rowwise() += recurrent_bias_;
    const std::vector<std::size_t> order = longest_first(sentences);
    const auto count = static_cast<Eigen::Index>(order.size());
    LstmSteps steps{Matrix(inputs.rows(), size), Matrix(inputs.rows(), size)};
    Matrix hidden(count, size);
    Matrix cell(count, size);
    for (Eigen::Index s = 0; s < count; ++s) {
      const auto sentence = static_cast<Eigen::Index>(order[static_cast<std::size_t>(s)]);
      hidden.row(s) = begin.output.row(sentence);
      cell.row(s) = begin.cell.row(sentence);
    }
    Matrix step(count, 4 * size);
    Eigen::Index running = count;
    for (Eigen::Index t = 0;; ++t) {
      while (running > 0 && sentences.length(order[static_cast<std::size_t>(running - 1)]) <= t)
        --running;
      if (running == 0) break;
      input_.multiply(hidden.topRows(running), recurrent_, step.topRows(running));
      for (Eigen::Index s = 0; s < running; ++s) {
        const Eigen::Index row = sentences.begin(order[static_cast<std::size_t>(s)]) + t;
        gates.row(row) += step.row(s);
        const auto part = [&](Eigen::Index index) {
          return gates.row(row).segment(index * size, size).array();
        };
        cell.row(s) =
            part(1).logistic() * cell.row(s).array() + part(0).logistic() * part(2).tanh();
        hidden.row(s) = part(3).logistic() * cell.row(s).array().tanh();
        steps.output.row(row) = hidden.row(s);
        steps.cell.row(row) = cell.row(s);
      }
    }
    return steps;
  }

 private:
  static std::vector<std::size_t> longest_first(const Sentences& sentences) {
    std::vector<std::size_t> order(sentences.count());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
      return sentences.length(a) > sentences.length(b);
    });
    return order;
  }

  Linear input_;
  MatrixMap recurrent_;
  RowMap recurrent_bias_;
};

/// Kind "lstm", the paper's (§3.4): FC + ReLU, two LSTM layers, self-attention with sparsemax whose
/// queries, keys and values all are the LSTM's output, and a residual FC of the compressed input.
class LstmTrunk final : public PredictorTrunk {
 public:
  LstmTrunk(TensorReader& tensors, const PredictorWeights& weights)
      : compress_(tensors.linear("compress", weights.hidden_size, weights.embedding_size)),
        first_(tensors, "_l0", weights.hidden_size),
        second_(tensors, "_l1", weights.hidden_size),
        residual_(tensors.linear("residual", weights.hidden_size, weights.hidden_size)) {}

  Matrix operator()(const Matrix& embeddings, const Sentences& sentences) const override {
    const Matrix compressed = relu(compress_(embeddings));
    const Matrix states = second_(first_(compressed, sentences), sentences);
    Matrix hidden = residual_(compressed);
    for (std::size_t s = 0; s < sentences.count(); ++s)
      add_sparse_attention(residual_.multiply,
                           states.middleRows(sentences.begin(s), sentences.length(s)),
                           hidden.middleRows(sentences.begin(s), sentences.length(s)));
    return hidden;
  }

 private:
  Linear compress_;
  LstmLayer first_;
  LstmLayer second_;
  Linear residual_;
};

}  // namespace sida::detail
