// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <iterator>
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
    passes_.emplace_back().keys = {key};
    recording_ = true;
    make_way();
  }

  /// Names the batch of the pass at hand, if there is one.
  void set_key(std::uint64_t key) {
    const std::lock_guard lock(mutex_);
    if (recording_) passes_.back().keys = {key};
  }

  /// The number of the pass at hand, for an add() that may come after its end; -1 outside a pass.
  std::int64_t pass() const {
    const std::lock_guard lock(mutex_);
    return recording_ ? first_ + std::ssize(passes_) - 1 : -1;
  }

  /// The routing of one layer: `ids`, `probs` and `weights` are [tokens, top_k]. An id of -1 is no
  /// expert; probability 0 says that it is one for padding, which is needed and not foretold.
  /// A pass's layers have one number of tokens; another call of the layer in the same pass replaces
  /// the first, and a layer of other size is left out, as is one of a pass that made way.
  void add(std::int64_t pass, std::int32_t layer, std::int64_t tokens, std::int32_t top_k,
           std::span<const std::int32_t> ids, std::span<const float> probs,
           std::span<const float> weights) {
    const std::lock_guard lock(mutex_);
    const std::int64_t place = pass - first_;
    if (pass < 0 || place < 0 || place >= std::ssize(passes_) || tokens == 0) return;
    HashTable& table = passes_[static_cast<std::size_t>(place)];
    if (table.ids.empty()) allocate(table, tokens, top_k);
    if (tokens != table.tokens() || top_k != table.candidates) return;
    const std::size_t begin = table.index(layer, 0, 0);
    for (std::size_t i = 0; i < ids.size(); ++i) {
      table.ids[begin + i] = ids[i];
      table.probs[begin + i] = ids[i] < 0 ? 0.0f : probs[i];
      table.scale[begin + i] = ids[i] < 0 ? 0.0f : weights[i];
    }
    make_way();
  }

  void end_pass() {
    const std::lock_guard lock(mutex_);
    recording_ = false;
  }

  /// The passes that have ended as one table, oldest first.
  HashTable table() const {
    const std::lock_guard lock(mutex_);
    std::vector<HashTable> tables;
    for (auto pass = passes_.begin(); pass != passes_.end() - recording_; ++pass)
      if (!pass->ids.empty()) tables.push_back(*pass);
    HashTable all = concatenate(tables);
    if (all.layers == 0) all.layers = layers_;
    return all;
  }

  /// Forgets all passes, what was recorded of the present one too.
  void clear() {
    const std::lock_guard lock(mutex_);
    const auto ended = std::ssize(passes_) - recording_;
    first_ += ended;
    passes_.erase(passes_.begin(), passes_.begin() + ended);
    for (HashTable& present : passes_) present.ids.clear();
    bytes_ = 0;
  }

 private:
  static constexpr std::ptrdiff_t most_passes = 1 << 16;

  void make_way() {
    while (std::ssize(passes_) > recording_ &&
           (bytes_ > capacity_bytes_ || std::ssize(passes_) > most_passes)) {
      bytes_ -= bytes_of(passes_.front());
      passes_.pop_front();
      ++first_;
    }
  }
  static std::size_t bytes_of(const HashTable& table) noexcept {
    return table.ids.size() * (sizeof(std::int32_t) + 2 * sizeof(float));
  }
  void allocate(HashTable& table, std::int64_t tokens, std::int32_t top_k) {
    table.layers = layers_;
    table.candidates = top_k;
    table.offsets = {0, tokens};
    const std::size_t size = table.index(layers_, 0, 0);
    table.ids.assign(size, -1);
    table.probs.assign(size, 0.0f);
    table.scale.assign(size, 0.0f);
    bytes_ += bytes_of(table);
  }

  std::int32_t layers_;
  std::size_t capacity_bytes_;
  mutable std::mutex mutex_;
  std::deque<HashTable> passes_;  // the last of which is at hand while recording
  std::int64_t first_ = 0;        // number of the oldest
  std::size_t bytes_ = 0;
  bool recording_ = false;
};

}  // namespace sida
