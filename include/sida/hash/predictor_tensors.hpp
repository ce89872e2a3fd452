// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "sida/core/error.hpp"
#include "sida/hash/predictor_weights.hpp"

namespace sida::detail {

/// Hands out a predictor's tensors, each checked against the shape that its kind asks for.
class PredictorTensors {
 public:
  explicit PredictorTensors(const PredictorWeights& weights) : weights_(weights) {}

  /// The values [rows, columns] of a tensor. @throws InvalidArgument naming it.
  const float* matrix(const std::string& name, std::int64_t rows, std::int64_t columns) {
    return find(name, {rows, columns}).values.data();
  }
  /// The values [size] of a tensor. @throws InvalidArgument naming it.
  const float* row(const std::string& name, std::int64_t size) {
    return find(name, {size}).values.data();
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
