// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "sida/hash/cpu/predictor_trunk.hpp"
#include "sida/hash/predictor_contract.hpp"

namespace sida::detail {

/// x / √(mean(x²) + 1e-6) ⊙ weight, row by row.
inline Matrix rms_norm(const Matrix& x, const RowMap& weight) {
  const Eigen::ArrayXf factor =
      (x.rowwise().squaredNorm().array() / static_cast<float>(x.cols()) + 1e-6f).rsqrt();
  return ((x.array().colwise() * factor).rowwise() * weight.array()).matrix();
}

/// Cosine and sine [length, size / 2] of the rotary angles (Su et al. 2021), base 10000. Worked out
/// in f64: f32 angles are off by 1e-4 after a thousand tokens.
struct RotaryAngles {
  RotaryAngles(Eigen::Index length, Eigen::Index size)
      : cosine(length, size / 2), sine(length, size / 2) {
    for (Eigen::Index i = 0; i < size / 2; ++i) {
      const double frequency =
          std::pow(10000.0, -2.0 * static_cast<double>(i) / static_cast<double>(size));
      for (Eigen::Index position = 0; position < length; ++position) {
        const double angle = static_cast<double>(position) * frequency;
        cosine(position, i) = static_cast<float>(std::cos(angle));
        sine(position, i) = static_cast<float>(std::sin(angle));
      }
    }
  }
  Matrix cosine;
  Matrix sine;
};

/// x += attention(norm(x)), then x += down(relu(up(norm(x)))).
class TransformerBlock {
 public:
  static constexpr Eigen::Index heads = transformer_heads;

  TransformerBlock(TensorReader& tensors, const std::string& name, std::int64_t size)
      : attention_norm_(tensors.row(name + ".attention_norm.weight", size)),
        qkv_(tensors.matrix(name + ".qkv.weight", 3 * size, size)),
        output_(tensors.matrix(name + ".output.weight", size, size)),
        feed_forward_norm_(tensors.row(name + ".feed_forward_norm.weight", size)),
        up_(tensors.linear(name + ".up", 2 * size, size)),
        down_(tensors.linear(name + ".down", size, 2 * size)) {}

  void operator()(Matrix& x, const Sentences& sentences, const RotaryAngles& angles) const {
    Matrix qkv(x.rows(), qkv_.rows());
    up_.multiply(rms_norm(x, attention_norm_), qkv_, qkv);
    const Eigen::Index size = x.cols() / heads;
    Matrix mixed(x.rows(), x.cols());
    for (std::size_t s = 0; s < sentences.count(); ++s) {
      auto rows = qkv.middleRows(sentences.begin(s), sentences.length(s));
      auto out = mixed.middleRows(sentences.begin(s), sentences.length(s));
      for (Eigen::Index head = 0; head < heads; ++head) {
        const auto part = [&](Eigen::Index which) {
          return rows.middleCols((which * heads + head) * size, size);
        };
        rotate(part(0), angles);
        rotate(part(1), angles);
        attend(up_.multiply, part(0), part(1), part(2), out.middleCols(head * size, size));
      }
    }
    Matrix projected(x.rows(), x.cols());
    up_.multiply(mixed, output_, projected);
    x += projected;
    x += down_(relu(up_(rms_norm(x, feed_forward_norm_))));
  }

 private:
  /// Turns elements i and i + size / 2 of each row by the angle of its position.
  template <class Rows>
  static void rotate(Rows&& rows, const RotaryAngles& angles) {
    const Eigen::Index half = rows.cols() / 2;
    const auto cosine = angles.cosine.topRows(rows.rows()).array();
    const auto sine = angles.sine.topRows(rows.rows()).array();
    const Matrix first = rows.leftCols(half);
    const Matrix second = rows.rightCols(half);
    rows.leftCols(half) = first.array() * cosine - second.array() * sine;
    rows.rightCols(half) = second.array() * cosine + first.array() * sine;
  }

  /// out = softmax(query · keyᵀ / √size) · value, some queries at a time.
  template <class Queries, class Keys, class Values, class Out>
  static void attend(const Multiplier& multiply, const Queries& query, const Keys& key,
                     const Values& value, Out&& out) {
    constexpr Eigen::Index block = 128;  // bounds the scores that are kept, at any length
    const float scale = 1.0f / std::sqrt(static_cast<float>(query.cols()));
    const Matrix columns = value.transpose();
    Matrix scores;
    for (Eigen::Index first = 0; first < query.rows(); first += block) {
      const Eigen::Index rows = std::min(block, query.rows() - first);
      scores.resize(rows, key.rows());
      multiply(query.middleRows(first, rows), key, scores);
      scores *= scale;
      scores.colwise() -= scores.rowwise().maxCoeff().eval();
      scores = scores.array().exp();
      const Eigen::ArrayXf sums = scores.rowwise().sum();
      multiply(scores, columns, out.middleRows(first, rows));
      out.middleRows(first, rows).array().colwise() /= sums;
    }
  }

  RowMap attention_norm_;
  MatrixMap qkv_;
  MatrixMap output_;
  RowMap feed_forward_norm_;
  Linear up_;
  Linear down_;
};

/// Kind "transformer": two pre-norm layers with rotary positions, and a last norm.
class TransformerTrunk final : public PredictorTrunk {
 public:
  TransformerTrunk(TensorReader& tensors, const PredictorWeights& weights)
      : compress_(tensors.linear("compress", weights.hidden_size, weights.embedding_size)),
        blocks_{TransformerBlock(tensors, "blocks.0", weights.hidden_size),
                TransformerBlock(tensors, "blocks.1", weights.hidden_size)},
        norm_(tensors.row("norm.weight", weights.hidden_size)) {
    expect_transformer_size(weights);
  }

  Matrix operator()(const Matrix& embeddings, const Sentences& sentences) const override {
    Eigen::Index longest = 0;
    for (std::size_t s = 0; s < sentences.count(); ++s)
      longest = std::max(longest, sentences.length(s));
    Matrix hidden = compress_(embeddings);
    const RotaryAngles angles(longest, hidden.cols() / TransformerBlock::heads);
    for (const TransformerBlock& block : blocks_) block(hidden, sentences, angles);
    return rms_norm(hidden, norm_);
  }

 private:
  Linear compress_;
  TransformerBlock blocks_[2];
  RowMap norm_;
};

}  // namespace sida::detail
