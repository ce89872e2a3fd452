// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <Eigen/Dense>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "sida/core/moe_config.hpp"
#include "sida/ffn/slab_layout.hpp"
#include "support/random_weights.hpp"

namespace sida::test {

using Matrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using Vector = Eigen::VectorXd;

/// rows x columns elements of `type` in f64.
inline Matrix matrix(const std::byte* data, DataType type, Eigen::Index rows,
                     Eigen::Index columns) {
  Matrix values(rows, columns);
  for (Eigen::Index i = 0; i < rows * columns; ++i) values.data()[i] = element(data, type, i);
  return values;
}

/// The definitions, in f64.
inline double reference_activation(Activation activation, double x, double limit = 7) {
  switch (activation) {
    case Activation::relu:
      return std::max(x, 0.0);
    case Activation::relu2:
      return std::pow(std::max(x, 0.0), 2);
    case Activation::gelu:
      return x * 0.5 * std::erfc(-x / std::sqrt(2.0));
    case Activation::gelu_tanh:
      return x * 0.5 * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::silu:
      return x / (1 + std::exp(-x));
    case Activation::silu_clamped:
      return std::min(x, limit) / (1 + std::exp(-std::min(x, limit)));
    case Activation::swiglu_clamped:
      return std::min(x, limit) / (1 + std::exp(-1.702 * std::min(x, limit)));
  }
  return x;
}

/// One expert for one token, straight from its definition, in f64.
inline Vector reference_expert(const MoeConfig& config, const std::vector<std::byte>& slab,
                               const Vector& x) {
  const SlabLayout layout(config);
  const double limit = static_cast<double>(config.limit);
  const Eigen::Index hidden = config.hidden_size, intermediate = config.intermediate_size;
  const Eigen::Index up_rows = config.gated ? 2 * intermediate : intermediate;
  const auto part = [&](std::size_t offset, Eigen::Index rows, Eigen::Index columns) {
    return matrix(slab.data() + offset, config.dtype, rows, columns);
  };
  Vector up = part(layout.up_offset, up_rows, hidden) * x;
  if (config.up_bias) up += part(layout.up_bias_offset, up_rows, 1);
  Vector h = up.head(intermediate).unaryExpr([&](double value) {
    return reference_activation(config.activation, value, limit);
  });
  Vector factors = up.tail(intermediate);
  if (is_clamped(config.activation))
    factors = factors.unaryExpr([&](double value) { return std::clamp(value, -limit, limit); });
  if (config.activation == Activation::swiglu_clamped) factors.array() += 1;
  if (config.gated) h = h.cwiseProduct(factors);
  Vector out = part(layout.down_offset, hidden, intermediate) * h;
  if (config.down_bias) out += part(layout.down_bias_offset, hidden, 1);
  return out;
}

/// A whole layer call: [T, H] in f64. `ids` [T, k], `weights` [T, k]; assignments of weight 0 are
/// left out. `skip` leaves out one assignment more, t * k + j.
inline Matrix reference_layer(const MoeConfig& config,
                              const std::vector<std::vector<std::byte>>& slabs,
                              const Tensor& hidden, const Tensor& ids, const Tensor& weights,
                              std::int64_t skip = -1) {
  const Eigen::Index tokens = hidden.shape[0], top_k = ids.shape[1];
  const Matrix x = matrix(hidden.bytes.data(), hidden.type, tokens, config.hidden_size);
  Matrix out = Matrix::Zero(tokens, config.hidden_size);
  for (Eigen::Index a = 0; a < tokens * top_k; ++a) {
    if (a == skip || weights.at(a) == 0) continue;
    const auto& slab = slabs[static_cast<std::size_t>(ids.at(a))];
    const Eigen::Index t = a / top_k;
    out.row(t) += weights.at(a) * reference_expert(config, slab, x.row(t)).transpose();
  }
  return out;
}

/// ||got - expected|| / ||expected||, in the Frobenius norm. Both zero (or empty): 0.
inline double relative_error(const Matrix& got, const Matrix& expected) {
  const double norm = expected.norm();
  return norm == 0 ? got.norm() : (got - expected).norm() / norm;
}

/// The largest relative error that each storage type is allowed against the reference.
inline double tolerance(DataType type) {
  switch (type) {
    case DataType::f64:
      return 1e-13;
    case DataType::f16:
      return 1e-3;
    case DataType::bf16:
      return 5e-3;
    default:
      return 1e-5;
  }
}

}  // namespace sida::test
