// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "sida/backend/cpu/f32_product.hpp"
#include "sida/backend/cpu/isa.hpp"
#include "sida/hash/predictor_tensors.hpp"

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

/// Products of f32 matrices on the kernels of an instruction set.
class Multiplier {
 public:
  explicit Multiplier(Isa isa) : multiply_(f32_multiply<float>(isa)) {}

  /// y = x · weightᵀ; weight [out, in]. A row's bits do not depend on the rows beside it.
  void operator()(const Eigen::Ref<const Matrix>& x, const Eigen::Ref<const Matrix>& weight,
                  Eigen::Ref<Matrix> y) const {
    float block[block_rows * block_columns];
    const float* rows[block_rows];
    Matrix padded;
    Product<float, float> product;
    product.inputs = rows;
    product.row_bytes = weight.outerStride() * static_cast<std::int64_t>(sizeof(float));
    product.element_bytes = sizeof(float);
    product.depth = x.cols();
    product.out = block;
    product.out_stride = block_columns;
    for (Eigen::Index row = 0; row < x.rows(); row += block_rows) {
      product.rows = std::min(block_rows, x.rows() - row);
      set_rows(x.middleRows(row, product.rows), padded, rows);
      for (Eigen::Index column = 0; column < weight.rows(); column += block_columns) {
        product.outputs = std::min(block_columns, weight.rows() - column);
        product.weights = reinterpret_cast<const std::byte*>(weight.row(column).data());
        multiply_(product);
        y.block(row, column, product.rows, product.outputs) =
            Eigen::Map<const Matrix, 0, Eigen::OuterStride<block_columns>>(block, product.rows,
                                                                           product.outputs);
      }
    }
  }

 private:
  static constexpr Eigen::Index block_rows = 48;     // that share weights in the caches
  static constexpr Eigen::Index block_columns = 32;  // whose weights do

  /// Points to the rows, or where they end between two vectors to copies that end in zeros.
  static void set_rows(const Eigen::Ref<const Matrix>& x, Matrix& padded, const float** rows) {
    const Eigen::Index rest = x.cols() % input_padding;
    if (rest != 0) {
      padded.setZero(x.rows(), x.cols() - rest + input_padding);
      padded.leftCols(x.cols()) = x;
    }
    for (Eigen::Index i = 0; i < x.rows(); ++i)
      rows[i] = rest == 0 ? x.row(i).data() : padded.row(i).data();
  }

  MultiplyFunction<float, float> multiply_;
};

/// y = x · weightᵀ + bias. A view of PredictorWeights.
struct Linear {
  MatrixMap weight;
  RowMap bias;
  Multiplier multiply;

  Matrix operator()(const Matrix& x) const {
    Matrix y(x.rows(), weight.rows());
    multiply(x, weight, y);
    y.rowwise() += bias;
    return y;
  }
};

/// max(x, 0); NaN stays NaN.
inline Matrix relu(Matrix x) {
  float* values = x.data();
  for (Eigen::Index i = 0; i < x.size(); ++i) values[i] = values[i] < 0.0f ? 0.0f : values[i];
  return x;
}

/// Hands out views of a predictor's tensors, each checked against the shape that its kind asks for.
class TensorReader {
 public:
  TensorReader(const PredictorWeights& weights, Isa isa) : tensors_(weights), multiplier_(isa) {}

  MatrixMap matrix(const std::string& name, std::int64_t rows, std::int64_t columns) {
    return {tensors_.matrix(name, rows, columns), rows, columns};
  }
  RowMap row(const std::string& name, std::int64_t size) {
    return {tensors_.row(name, size), size};
  }
  Linear linear(const std::string& name, std::int64_t out, std::int64_t in) {
    return {matrix(name + ".weight", out, in), row(name + ".bias", out), multiplier_};
  }

  /// For products with what was handed out.
  const Multiplier& multiplier() const noexcept { return multiplier_; }

  /// @throws InvalidArgument naming a tensor that nobody asked for.
  void expect_all_read() const { tensors_.expect_all_read(); }

 private:
  PredictorTensors tensors_;
  Multiplier multiplier_;
};

}  // namespace sida::detail
