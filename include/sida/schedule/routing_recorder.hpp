// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>
#include <span>
#include <utility>
#include <vector>

#include "sida/hash/hash_table.hpp"

namespace sida {

/// The routing of the latest passes, at most `capacity_bytes` of it: older passes make way.
/// Recording a run gives the hash table that a perfect predictor would have built. Thread-safe.
class RoutingRecorder {
 public:
  RoutingRecorder(std::int32_t layers, std::size_t capacity_bytes)
      : layers_(layers), capacity_bytes_(capacity_bytes) {}

  /// Begins a pass; the one before has ended.
  void begin_pass(std::uint64_t key) {
    const std::lock_guard lock(mutex_);
    keep_current();
    current_ = {};
    current_.keys = {key};
    recording_ = true;
  }

  /// The routing of one layer: `ids`, `probs` and `weights` are [tokens, top_k]. An id of -1 is no
  /// expert; probability 0 says that it is one for padding, which is needed and not foretold.
  /// A pass's layers have one number of tokens; another call of the layer in the same pass replaces
  /// the first, and a layer of other size is left out.
  void add(std::int32_t layer, std::int64_t tokens, std::int32_t top_k,
           std::span<const std::int32_t> ids, std::span<const float> probs,
           std::span<const float> weights) {
    const std::lock_guard lock(mutex_);
    if (!recording_ || tokens == 0) return;
    if (current_.ids.empty()) allocate(tokens, top_k);
    if (tokens != current_.tokens() || top_k != current_.candidates) return;
    const std::size_t begin = current_.index(layer, 0, 0);
    for (std::size_t i = 0; i < ids.size(); ++i) {
      current_.ids[begin + i] = ids[i];
      current_.probs[begin + i] = ids[i] < 0 ? 0.0f : probs[i];
      current_.scale[begin + i] = ids[i] < 0 ? 0.0f : weights[i];
    }
  }

  void end_pass() {
    const std::lock_guard lock(mutex_);
    keep_current();
  }

  /// The passes that have ended as one table, oldest first.
  HashTable table() const {
    const std::lock_guard lock(mutex_);
    const std::vector<HashTable> tables(passes_.begin(), passes_.end());
    HashTable all = concatenate(tables);
    if (all.layers == 0) all.layers = layers_;
    return all;
  }

  /// Forgets all passes, what was recorded of the present one too.
  void clear() {
    const std::lock_guard lock(mutex_);
    passes_.clear();
    bytes_ = 0;
    current_.ids.clear();
  }

 private:
  void keep_current() {
    if (recording_ && !current_.ids.empty()) {
      bytes_ += bytes_of(current_);
      passes_.push_back(std::move(current_));
      while (bytes_ > capacity_bytes_ && !passes_.empty()) {
        bytes_ -= bytes_of(passes_.front());
        passes_.pop_front();
      }
    }
    recording_ = false;
  }
  static std::size_t bytes_of(const HashTable& table) noexcept {
    return table.ids.size() * (sizeof(std::int32_t) + 2 * sizeof(float));
  }
  void allocate(std::int64_t tokens, std::int32_t top_k) {
    current_.layers = layers_;
    current_.candidates = top_k;
    current_.offsets = {0, tokens};
    const std::size_t size = current_.index(layers_, 0, 0);
    current_.ids.assign(size, -1);
    current_.probs.assign(size, 0.0f);
    current_.scale.assign(size, 0.0f);
  }

  std::int32_t layers_;
  std::size_t capacity_bytes_;
  mutable std::mutex mutex_;
  std::deque<HashTable> passes_;
  HashTable current_;
  std::size_t bytes_ = 0;
  bool recording_ = false;
};

}  // namespace sida
