// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "predictor_kernels.hpp"

namespace sida::cuda {

/// Hands out places in one piece of memory, before it is there.
class Layout {
 public:
  /// Where `count` elements of T begin.
  template <class T>
  std::size_t place(std::size_t count) {
    const std::size_t at = bytes_;
    bytes_ += (count * sizeof(T) + 255) / 256 * 256;
    return at;
  }
  std::size_t bytes() const noexcept { return bytes_; }

 private:
  std::size_t bytes_ = 0;
};

/// Some sentences of a batch, which are worked on together: their tokens without padding.
struct PredictorBatch {
  std::vector<std::int32_t> tokens;     ///< of each row, among the sentences' positions
  std::vector<std::int32_t> positions;  ///< of each row in its sentence, padding not counted
  std::vector<SentenceRows> sentences;  ///< the longest first
  std::vector<AttentionTile> tiles;
  int count = 0;    ///< sentences
  int longest = 0;  ///< rows of a sentence

  int rows() const noexcept { return static_cast<int>(tokens.size()); }
};

/// @param mask of the sentences' positions, or empty where all are tokens.
/// @param key_rows rows of keys that each sentence has to itself; 0: keys are the batch's rows.
/// @param is_causal whether a tile's last query sees the keys up to its own only.
inline PredictorBatch make_batch(int sentences, int length, std::span<const std::uint8_t> mask,
                                 int key_rows, bool is_causal) {
  PredictorBatch batch;
  batch.count = sentences;
  for (std::int32_t s = 0; s < sentences; ++s) {
    const int begin = batch.rows();
    for (std::int32_t token = s * length; token < (s + 1) * length; ++token)
      if (mask.empty() || mask[static_cast<std::size_t>(token)] != 0) {
        batch.positions.push_back(batch.rows() - begin);
        batch.tokens.push_back(token);
      }
    const int rows = batch.rows() - begin;
    batch.sentences.push_back({begin, rows, s});
    batch.longest = std::max(batch.longest, rows);
    for (int first = 0; first < rows; first += AttentionTile::most) {
      const int queries = std::min(AttentionTile::most, rows - first);
      batch.tiles.push_back({begin + first, queries, key_rows > 0 ? s * key_rows : begin,
                             is_causal ? first + queries : rows, s});
    }
  }
  std::ranges::stable_sort(batch.sentences, [](const SentenceRows& a, const SentenceRows& b) {
    return a.length > b.length;
  });
  return batch;
}

}  // namespace sida::cuda
