// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;

// The steps of a hash predictor on a GPU, in f32. Nothing waits; all pointers are of the GPU's
// memory. What comes out of a row does not depend on the rows beside it. They throw
// std::invalid_argument for sizes that the device has no room for, std::runtime_error for CUDA's
// errors.
namespace sida::cuda {

/// y = x · weightᵀ + bias (+ second_bias).
struct PredictorLinear {
  const float* weight = nullptr;  ///< [out, in]
  const float* bias = nullptr;    ///< [out], or null
  const float* second_bias = nullptr;
  int out = 0, in = 0;
};

enum class LinearResult { plain, relu, added };  ///< added: to what y holds

/// `x`: [.., in]; row i of y, [count, out], is of x's row rows[i], or i where `rows` is null.
void apply(const PredictorLinear& linear, const float* x, const std::int32_t* rows, float* y,
           int count, LinearResult result, CUstream_st* stream);

/// A sentence without its padding: rows [begin, begin + length).
struct SentenceRows {
  std::int32_t begin, length;
  std::int32_t index;  ///< of the sentence in the batch
};

/// How the steps of an LSTM layer are laid out on a device.
struct LstmPlan {
  int units = 0;   ///< of a block: a warp each
  int blocks = 0;  ///< that share a sentence
  int lanes = 0;   ///< groups of sentences at a time
  std::size_t shared_bytes = 0;
};

/// The plan for the current device. @throws std::invalid_argument for a hidden size that is too
/// large for it.
LstmPlan plan_lstm(int hidden);

/// One layer, step by step. What does not depend on the step before is in `gates` ([rows, 4 H]:
/// input, forget, cell, output).
struct LstmCall {
  const float* recurrent = nullptr;         ///< [4 H, H]
  const float* gates = nullptr;             ///< [rows, 4 H]
  const SentenceRows* sentences = nullptr;  ///< the longest first
  int count = 0, hidden = 0;
  /// Where sentences go on from: their row of `past`, [.., past_stride], or below 0 for the
  /// beginning, by SentenceRows::index. Null: all begin.
  const std::int32_t* last = nullptr;
  const float* past = nullptr;
  int past_stride = 0;
  int past_column = 0;           ///< of the output; the cell comes behind it
  float* output = nullptr;       ///< [rows, H]
  float* cell = nullptr;         ///< [rows, H], or null
  unsigned* counters = nullptr;  ///< lstm_counters(plan) of them
};

std::size_t lstm_counters(const LstmPlan& plan);
void run_lstm(const LstmPlan& plan, const LstmCall& call, CUstream_st* stream);

/// Some queries of one sentence, rows [row, row + rows) of the batch.
struct AttentionTile {
  static constexpr int most = 8;
  std::int32_t row, rows;
  std::int32_t key;       ///< the sentence's first row of keys and values
  std::int32_t keys;      ///< that the tile's last query sees, beside earlier ones
  std::int32_t sentence;  ///< its index in the batch
};

struct AttentionCall {
  const AttentionTile* tiles = nullptr;
  int tile_count = 0, heads = 1, size = 0;  ///< size: of a head
  const float* query = nullptr;             ///< a row's heads lie one behind the other
  const float* key = nullptr;
  const float* value = nullptr;
  int query_stride = 0, key_stride = 0;   ///< floats between rows; value's as key's
  const std::int32_t* earlier = nullptr;  ///< further keys before a sentence's own; or null
  bool is_causal = false;                 ///< a query sees the keys up to its own
  float* out = nullptr;                   ///< [rows, heads * size]
  void* scratch = nullptr;
  int longest = 0;  ///< most keys of a sentence
};

/// Bytes of scratch memory; at most attention_limit, but for sentences of more than 500,000 tokens.
std::size_t attention_scratch(int tiles, int heads, int longest);
inline constexpr std::size_t attention_limit = std::size_t{32} << 20;

/// out = softmax(query · keyᵀ / √size) · value.
void attend(const AttentionCall& call, CUstream_st* stream);
/// out += sparsemax(query · keyᵀ) · value.
void attend_sparsely(const AttentionCall& call, CUstream_st* stream);

/// y = x / √(mean(x²) + 1e-6) ⊙ weight, each [rows, size].
void rms_norm(const float* x, const float* weight, float* y, int rows, int size,
              CUstream_st* stream);
/// Turns queries and keys in `qkv`, [rows, 3 · heads · size], by the rotary angle of their
/// position.
void rotate(float* qkv, const std::int32_t* position, int rows, int heads, int size,
            CUstream_st* stream);

/// States of earlier tokens, [sentences, tokens, 1 + 4 H], the first number 0 for padding.
struct PastStates {
  const float* states = nullptr;
  int sentences = 0, tokens = 0, hidden = 0;
};
/// Packs the second layer's outputs of each sentence s, less padding, to the rows of `seen` from
/// s * seen_rows on; earlier[s]: how many; last[s]: the last one's row of states, or -1.
void gather_past(const PastStates& past, float* seen, int seen_rows, std::int32_t* earlier,
                 std::int32_t* last, CUstream_st* stream);
/// Puts the latest outputs, [rows, H], behind them.
void append_latest(const float* output, const SentenceRows* sentences, int count, int hidden,
                   float* seen, int seen_rows, const std::int32_t* earlier, int longest,
                   CUstream_st* stream);
/// Row i's state to row tokens[i] of `states`.
void write_states(const float* const (&parts)[4], const std::int32_t* tokens, int rows, int hidden,
                  float* states, CUstream_st* stream);

/// The likeliest experts of each row and head.
struct Choices {
  std::int32_t* ids = nullptr;  ///< [heads, rows, candidates], as all
  float* probs = nullptr;
  float* scale = nullptr;
};
/// `logits`, [rows, heads · experts], are overwritten.
void choose_experts(float* logits, const float* hidden, const PredictorLinear& scale, int rows,
                    int heads, int experts, int candidates, float scale_factor,
                    const Choices& choices, CUstream_st* stream);

}  // namespace sida::cuda
