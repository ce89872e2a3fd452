// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sida/backend/cpu/isa.hpp"
#include "sida/backend/cpu_backend.hpp"
#include "sida/core/tensor_view.hpp"
#include "sida/hash/cpu/causal_lstm_trunk.hpp"
#include "sida/hash/cpu/lstm_trunk.hpp"
#include "sida/hash/cpu/routing_heads.hpp"
#include "sida/hash/cpu/transformer_trunk.hpp"
#include "sida/hash/hash_predictor.hpp"
#include "sida/hash/predictor_contract.hpp"

namespace sida {

/// The predictor on the CPU, in f32. Immutable and thread-safe; copies share the weights.
template <>
class HashPredictor<CpuBackend> {
 public:
  /// @throws InvalidArgument if a size cannot be right, the kind is unknown, a tensor is missing,
  /// left over or of another shape than the sizes ask for, or this processor lacks `isa`.
  explicit HashPredictor(PredictorWeights weights, Isa isa = best_isa()) {
    expect_runs(isa);
    parts_ = std::make_shared<const Parts>(std::move(weights), isa);
  }

  /// Hash table of one batch.
  ///
  /// `embeddings`: [B, S, D] f32. `mask`: [B * S], nonzero for tokens, or empty where there is no
  /// padding. `key`: the table's key for the batch (see batch_key). The table has all layers of the
  /// model, B * S tokens and min(experts, max_candidates) candidates, by falling probability, lower
  /// ids first among equals. Padding and layers without a head have id -1, probability and scale 0.
  /// A token whose prediction is not finite gets some valid ids, probability 0 and scale NaN.
  /// @throws InvalidArgument for other shapes or dtypes.
  HashTable predict(const ConstTensorView& embeddings, std::span<const std::uint8_t> mask,
                    std::uint64_t key, std::int32_t max_candidates = 8) const {
    detail::check_batch(parts_->weights, embeddings, mask, max_candidates);
    const std::int64_t sentences = embeddings.shape[0], length = embeddings.shape[1];
    HashTable table = detail::empty_table(parts_->weights, sentences * length, key,
                                          std::min(parts_->weights.experts, max_candidates));
    for_each_chunk(sentences, length, mask, [&](const Chunk& chunk) {
      const detail::Matrix rows = rows_of(chunk, embeddings);
      parts_->heads.fill((*parts_->trunk)(rows, chunk.sentences), chunk.tokens, table);
    });
    return table;
  }
  /// Whether advance() can go on: what is foretold of a token depends on none that follows.
  bool is_causal() const noexcept { return detail::is_causal(parts_->weights); }

  /// Floats of a token's state; 0 where what is foretold of a token depends on it alone.
  std::int64_t state_size() const noexcept { return detail::state_size(parts_->weights); }

  /// As predict(), for the latest tokens of sentences that began earlier, as a decoder meets them.
  ///
  /// `past`: [B, P, state_size()] f32, the states of all tokens before; `states`: [B, S,
  /// state_size()] f32, where those of the latest are written. A state is taken up again as it is,
  /// in any order of sentences and cut off anywhere: that of padding says that it is padding.
  /// @throws InvalidArgument for other shapes or dtypes, and for kinds that are not causal.
  HashTable advance(const ConstTensorView& embeddings, std::span<const std::uint8_t> mask,
                    const ConstTensorView& past, const TensorView& states, std::uint64_t key,
                    std::int32_t max_candidates = 8) const {
    detail::check_batch(parts_->weights, embeddings, mask, max_candidates);
    detail::check_states(parts_->weights, embeddings, past, states);
    const std::int64_t sentences = embeddings.shape[0], length = embeddings.shape[1];
    if (states.bytes() > 0) std::memset(states.data, 0, states.bytes());
    HashTable table = detail::empty_table(parts_->weights, sentences * length, key,
                                          std::min(parts_->weights.experts, max_candidates));
    for_each_chunk(sentences, length, mask, [&](const Chunk& chunk) {
      std::vector<detail::Matrix> earlier;
      for (std::size_t s = 0; s < chunk.sentences.count(); ++s)
        earlier.push_back(past_of(past, chunk.first + static_cast<std::int64_t>(s)));
      const detail::Advanced advanced =
          parts_->trunk->advance(rows_of(chunk, embeddings), chunk.sentences, earlier);
      parts_->heads.fill(advanced.hidden, chunk.tokens, table);
      write_states(chunk, advanced.states, states);
    });
    return table;
  }

  const PredictorWeights& weights() const noexcept { return parts_->weights; }

 private:
  /// Sentences are worked on together, for the sake of large products, until they have this many
  /// tokens: intermediate results stay within a few MiB.
  static constexpr Eigen::Index chunk_tokens = 1024;

  /// Some sentences: which tokens of the batch they consist of.
  struct Chunk {
    std::vector<std::int64_t> tokens;
    detail::Sentences sentences;
    std::int64_t first = 0;  ///< its first sentence
  };

  /// The weights and what views them; never moved.
  struct Parts {
    Parts(PredictorWeights given, Isa isa)
        : weights(detail::checked(std::move(given))),
          tensors(weights, isa),
          heads(tensors, weights) {
      if (weights.kind == "lstm") {
        trunk = std::make_unique<detail::LstmTrunk>(tensors, weights);
      } else if (weights.kind == "causal_lstm") {
        trunk = std::make_unique<detail::CausalLstmTrunk>(tensors, weights);
      } else if (weights.kind == "transformer") {
        trunk = std::make_unique<detail::TransformerTrunk>(tensors, weights);
      } else if (weights.kind == "token") {
        trunk = std::make_unique<detail::TokenTrunk>(tensors, weights);
      } else {
        detail::refuse_kind(weights);
      }
      tensors.expect_all_read();
    }
    Parts(const Parts&) = delete;
    Parts& operator=(const Parts&) = delete;

    PredictorWeights weights;
    detail::TensorReader tensors;
    detail::RoutingHeads heads;
    std::unique_ptr<detail::PredictorTrunk> trunk;
  };

  /// Calls `work` with some sentences at a time.
  template <class Work>
  void for_each_chunk(std::int64_t sentences, std::int64_t length,
                      std::span<const std::uint8_t> mask, Work&& work) const {
    Chunk chunk;
    for (std::int64_t s = 0; s < sentences; ++s) {
      for (std::int64_t token = s * length; token < (s + 1) * length; ++token)
        if (mask.empty() || mask[static_cast<std::size_t>(token)] != 0)
          chunk.tokens.push_back(token);
      const auto rows = static_cast<Eigen::Index>(chunk.tokens.size());
      chunk.sentences.offsets.push_back(rows);
      if (rows >= chunk_tokens || s + 1 == sentences) {
        if (rows > 0) work(std::as_const(chunk));
        chunk = {};
        chunk.first = s + 1;
      }
    }
  }

  detail::Matrix rows_of(const Chunk& chunk, const ConstTensorView& embeddings) const {
    const Eigen::Index size = parts_->weights.embedding_size;
    const auto* data = reinterpret_cast<const float*>(embeddings.data);
    detail::Matrix rows(chunk.sentences.rows(), size);
    for (Eigen::Index i = 0; i < rows.rows(); ++i)
      rows.row(i) = detail::RowMap(data + chunk.tokens[static_cast<std::size_t>(i)] * size, size);
    return rows;
  }

  detail::Matrix past_of(const ConstTensorView& past, std::int64_t sentence) const {
    const Eigen::Index size = parts_->trunk->state_size(), width = state_size();
    const auto* data = reinterpret_cast<const float*>(past.data) + sentence * past.shape[1] * width;
    detail::Matrix states(past.shape[1], size);
    Eigen::Index tokens = 0;
    for (std::int64_t i = 0; size > 0 && i < past.shape[1]; ++i, data += width)
      if (*data != 0) states.row(tokens++) = detail::RowMap(data + 1, size);
    states.conservativeResize(tokens, size);
    return states;
  }
  void write_states(const Chunk& chunk, const detail::Matrix& states, const TensorView& out) const {
    auto* const data = reinterpret_cast<float*>(out.data);
    for (Eigen::Index i = 0; state_size() > 0 && i < states.rows(); ++i) {
      float* const state = data + chunk.tokens[static_cast<std::size_t>(i)] * state_size();
      *state = 1;
      std::copy_n(states.row(i).data(), states.cols(), state + 1);
    }
  }

  std::shared_ptr<const Parts> parts_;
};

}  // namespace sida
