// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sida/core/error.hpp"
#include "sida/core/tensor_view.hpp"
#include "sida/hash/hash_table.hpp"
#include "sida/hash/predictor_weights.hpp"

// What a HashPredictor asks of its arguments, whichever its backend.
namespace sida::detail {

/// Heads of attention in predictors of kind "transformer".
inline constexpr std::int32_t transformer_heads = 4;

/// Whether what a kind foretells of a token depends on none that follows.
inline bool is_causal(const PredictorWeights& weights) {
  return weights.kind == "causal_lstm" || weights.kind == "token";
}

/// Floats of a token's state, [1 for tokens, 0 for padding; first layer's output and cell; second
/// layer's output and cell]; 0 where what is foretold of a token depends on it alone.
inline std::int64_t state_size(const PredictorWeights& weights) {
  return weights.kind == "causal_lstm" ? 1 + 4 * std::int64_t{weights.hidden_size} : 0;
}

/// The weights, whose sizes can be right. @throws InvalidArgument.
inline PredictorWeights checked(PredictorWeights weights) {
  for (const auto& [name, size] :
       {std::pair{"embedding_size", weights.embedding_size},
        std::pair{"hidden_size", weights.hidden_size}, std::pair{"experts", weights.experts},
        std::pair{"layers", weights.layers}})
    SIDA_EXPECTS(size > 0,
                 std::string("predictor: expected ") + name + " > 0, got " + std::to_string(size));
  SIDA_EXPECTS(!weights.heads.empty(), "predictor: expected one head or more, got none");
  std::int32_t before = -1;
  for (const std::int32_t head : weights.heads) {
    SIDA_EXPECTS(head > before && head < weights.layers,
                 "predictor: expected heads of layers 0 to " + std::to_string(weights.layers - 1) +
                     " in rising order, got " + std::to_string(head) + " after " +
                     std::to_string(before));
    before = head;
  }
  SIDA_EXPECTS(
      std::isfinite(weights.scale_factor) && weights.scale_factor > 0,
      "predictor: expected a finite scale_factor > 0, got " + std::to_string(weights.scale_factor));
  return weights;
}

/// @throws InvalidArgument for a hidden_size that attention cannot divide among its heads.
inline void expect_transformer_size(const PredictorWeights& weights) {
  SIDA_EXPECTS(weights.hidden_size % (2 * transformer_heads) == 0,
               "predictor of kind 'transformer': expected hidden_size to be a multiple of " +
                   std::to_string(2 * transformer_heads) + ", got " +
                   std::to_string(weights.hidden_size));
}

/// @throws InvalidArgument always: there is no such kind.
[[noreturn]] inline void refuse_kind(const PredictorWeights& weights) {
  throw InvalidArgument("predictor: expected kind lstm, causal_lstm, transformer or token, got '" +
                        weights.kind + "'");
}

/// @throws InvalidArgument for arguments of predict() that do not fit the predictor.
inline void check_batch(const PredictorWeights& weights, const ConstTensorView& embeddings,
                        std::span<const std::uint8_t> mask, std::int32_t max_candidates) {
  const std::int32_t size = weights.embedding_size;
  SIDA_EXPECTS(embeddings.type == DataType::f32 && embeddings.shape.size() == 3 &&
                   embeddings.shape[2] == size,
               "predict: expected embeddings [B, S, " + std::to_string(size) + "] f32, got " +
                   embeddings.describe());
  SIDA_EXPECTS(embeddings.shape[0] >= 0 && embeddings.shape[1] >= 0,
               "predict: expected B and S >= 0, got " + embeddings.describe());
  const std::int64_t tokens = embeddings.shape[0] * embeddings.shape[1];
  SIDA_EXPECTS(mask.empty() || mask.size() == static_cast<std::size_t>(tokens),
               "predict: expected a mask of " + std::to_string(tokens) + " elements or none, got " +
                   std::to_string(mask.size()));
  SIDA_EXPECTS(max_candidates >= 1,
               "predict: expected max_candidates >= 1, got " + std::to_string(max_candidates));
}

/// @throws InvalidArgument for arguments of advance() that do not fit the predictor.
inline void check_states(const PredictorWeights& weights, const ConstTensorView& embeddings,
                         const ConstTensorView& past, const TensorView& states) {
  SIDA_EXPECTS(is_causal(weights),
               "advance: expected a predictor of kind causal_lstm or token, which "
               "foretell a token from those before it, got '" +
                   weights.kind + "'");
  const auto expect = [&](const auto& view, std::int64_t tokens, const char* name) {
    const std::vector<std::int64_t> expected{embeddings.shape[0], tokens, state_size(weights)};
    SIDA_EXPECTS(view.type == DataType::f32 && view.shape == expected,
                 "advance: expected " + std::string(name) + " [" + std::to_string(expected[0]) +
                     ", " + std::to_string(tokens) + ", " + std::to_string(expected[2]) +
                     "] f32, got " + view.describe());
  };
  expect(past, past.shape.size() == 3 ? past.shape[1] : 0, "past");
  expect(states, embeddings.shape[1], "states");
}

/// A table of one batch that foretells nothing yet.
inline HashTable empty_table(const PredictorWeights& weights, std::int64_t tokens,
                             std::uint64_t key, std::int32_t candidates) {
  HashTable table;
  table.layers = weights.layers;
  table.candidates = candidates;
  table.keys = {key};
  table.offsets = {0, tokens};
  const std::size_t size = table.index(table.layers, 0, 0);
  table.ids.assign(size, -1);
  table.probs.assign(size, 0.0f);
  table.scale.assign(size, 0.0f);
  return table;
}

}  // namespace sida::detail
