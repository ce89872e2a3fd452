// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace sida {

/// One parameter of a hash predictor, row-major f32.
struct PredictorTensor {
  std::vector<std::int64_t> shape;
  std::vector<float> values;
};

/// A trained hash predictor as plain data: what its file holds. HashPredictor checks that names and
/// shapes of the tensors are those of its kind.
struct PredictorWeights {
  std::string kind;  ///< "lstm" (the paper's), "causal_lstm", "transformer" or "token"
  std::int32_t embedding_size = 0;  ///< D of the embeddings that it reads
  std::int32_t hidden_size = 0;
  std::int32_t experts = 0;         ///< in each MoE layer of the model
  std::int32_t layers = 0;          ///< MoE layers of the model
  std::vector<std::int32_t> heads;  ///< the MoE layer that each head predicts
  float scale_factor = 1;
  std::string fingerprint;  ///< of the model that it was trained for; may be empty
  std::map<std::string, PredictorTensor> tensors;
};

}  // namespace sida
