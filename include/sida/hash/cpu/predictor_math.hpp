// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <Eigen/Core>
#include <cstddef>
#include <cstdint>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "sida/core/error.hpp"
#include "sida/hash/predictor_weights.hpp"

namespace sida::detail {

using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using Row = Eigen::Matrix<float, 1, Eigen::Dynamic>;
using MatrixMap = Eigen::Map<const Matrix>;
using RowMap = Eigen::Map<const Row>;

/// Tokens of several sentences without their padding: sentence s has rows
/// [offsets[s], offsets[s + 1]).
struct Sentences {
  std::vector<Eigen::Index> offsets{0};

  std::size_t count() const noexcept { return offsets.size() - 1; }
  Eigen::Index rows() const noexcept { return offsets.back(); }
  Eigen::Index begin(std::size_t s) const noexcept { return offsets[s]; }
  Eigen::Index length(std::size_t s) const noexcept { return offsets[s + 1] - offsets[s]; }
};

/// y = x · weightᵀ; weight [out, in]. Every product of the predictors with their weights is here.
inline void multiply(const Eigen::Ref<const Matrix>& x, const MatrixMap& weight,
                     Eigen::Ref<Matrix> y) {
  // Eigen's matrix product repacks the weights each time, which few rows do not pay back.
  constexpr Eigen::Index few = 16;
  if (x.rows() > few) {
    y.noalias() = x * weight.transpose();
    return;
  }
  for (Eigen::Index i = 0; i < x.rows(); ++i)
    y.row(i).transpose().noalias() = weight * x.row(i).transpose();
}

/// y = x · weightᵀ + bias. A view of PredictorWeights.
struct Linear {
  MatrixMap weight;
  RowMap bias;

  Matrix operator()(const Matrix& x) const {
    Matrix y(x.rows(), weight.rows());
    multiply(x, weight, y);
    y.rowwise() += bias;
    return y;
  }
};

/// max(x, 0); NaN stays NaN.
inline Matrix relu(Matrix x) {
  x = (x.array() < 0.0f).select(0.0f, x);
  return x;
}

/// Hands out views of a predictor's tensors, each checked against the shape that its kind asks for.
class TensorReader {
 public:
  explicit TensorReader(const PredictorWeights& weights) : weights_(weights) {}

  MatrixMap matrix(const std::string& name, std::int64_t rows, std::int64_t columns) {
    const PredictorTensor& tensor = find(name, {rows, columns});
    return {tensor.values.data(), rows, columns};
  }
  RowMap row(const std::string& name, std::int64_t size) {
    return {find(name, {size}).values.data(), size};
  }
  Linear linear(const std::string& name, std::int64_t out, std::int64_t in) {
    return {matrix(name + ".weight", out, in), row(name + ".bias", out)};
  }

  /// @throws InvalidArgument naming a tensor that nobody asked for.
  void expect_all_read() const {
    for (const auto& [name, tensor] : weights_.tensors)
      SIDA_EXPECTS(read_.count(name) == 1,
                   "predictor of kind '" + weights_.kind + "': expected no tensor '" + name + "'");
  }

 private:
  const PredictorTensor& find(const std::string& name, const std::vector<std::int64_t>& shape) {
    const auto found = weights_.tensors.find(name);
    const std::string expected = "predictor of kind '" + weights_.kind + "': expected a tensor '" +
                                 name + "' of shape " + describe(shape);
    SIDA_EXPECTS(found != weights_.tensors.end(), expected + ", found none");
    const PredictorTensor& tensor = found->second;
    SIDA_EXPECTS(tensor.shape == shape, expected + ", got " + describe(tensor.shape));
    std::size_t left = tensor.values.size();
    bool whole = left > 0;
    for (const std::int64_t extent : shape) {
      whole = whole && left % static_cast<std::size_t>(extent) == 0;
      left /= static_cast<std::size_t>(extent);
    }
    SIDA_EXPECTS(whole && left == 1,
                 expected + ", got " + std::to_string(tensor.values.size()) + " values");
    read_.insert(name);
    return tensor;
  }

  static std::string describe(const std::vector<std::int64_t>& shape) {
    std::string text;
    for (const std::int64_t extent : shape)
      text += (text.empty() ? "" : ", ") + std::to_string(extent);
    return "[" + text + "]";
  }

  const PredictorWeights& weights_;
  std::set<std::string> read_;
};

}  // namespace sida::detail
