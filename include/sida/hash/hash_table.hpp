// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "sida/core/error.hpp"

namespace sida {

/// For every MoE layer and token, which experts will be active and with what scale (paper §3.2).
///
/// Holds one or many batches. Tokens of all batches stand one behind the other: batch b has tokens
/// [offsets[b], offsets[b + 1]), in the order of the flattened [sequences, positions] input, and is
/// found by keys[b]. The arrays are [layers, tokens, candidates], row-major, candidates by falling
/// probability. An id of -1 means that nothing is foretold: a padding token, a layer without a
/// head, fewer candidates than the table is wide. In recorded routing, an expert of probability 0
/// is needed for padding and not foretold.
struct HashTable {
  std::int32_t layers = 0;      ///< all MoE layers of the model
  std::int32_t candidates = 0;  ///< experts named for each token
  std::vector<std::uint64_t> keys;
  std::vector<std::int64_t> offsets{0};
  std::vector<std::int32_t> ids;
  std::vector<float> probs;  ///< probability that the expert is active for the token
  std::vector<float> scale;  ///< what the router would return as the expert's weight

  std::int64_t tokens() const noexcept { return offsets.back(); }
  std::int64_t batches() const noexcept { return static_cast<std::int64_t>(keys.size()); }
  std::size_t index(std::int32_t layer, std::int64_t token, std::int32_t candidate) const noexcept {
    return (static_cast<std::size_t>(layer) * static_cast<std::size_t>(tokens()) +
            static_cast<std::size_t>(token)) *
               static_cast<std::size_t>(candidates) +
           static_cast<std::size_t>(candidate);
  }

  /// The table of batch `batch` alone. @throws OutOfRange if there is no such batch.
  HashTable slice(std::int64_t batch) const;

  /// Puts the other table's batches behind this one's; an empty table takes the other's sizes.
  /// Copies both: use concatenate for many. @throws InvalidArgument if layers or candidates differ.
  void append(const HashTable& other);

  /// The first batch with this key, or nothing.
  std::optional<std::int64_t> find(std::uint64_t key) const noexcept {
    const auto found = std::find(keys.begin(), keys.end(), key);
    if (found == keys.end()) return std::nullopt;
    return found - keys.begin();
  }

  /// @throws InvalidArgument naming the first thing that cannot be right: sizes that do not agree,
  /// an id outside [-1, experts), a probability outside [0, 1]. For tables from elsewhere.
  void validate(std::int32_t experts = std::numeric_limits<std::int32_t>::max()) const;
};

/// One table of all the tables' batches, in their order; empty tables add nothing.
/// @throws InvalidArgument if layers or candidates differ.
inline HashTable concatenate(std::span<const HashTable> tables) {
  HashTable all;
  for (const HashTable& table : tables) {
    if (table.batches() == 0) continue;
    if (all.batches() == 0) {
      all.layers = table.layers;
      all.candidates = table.candidates;
    }
    SIDA_EXPECTS(table.layers == all.layers && table.candidates == all.candidates,
                 "HashTable: expected a table of " + std::to_string(all.layers) + " layers and " +
                     std::to_string(all.candidates) + " candidates, got " +
                     std::to_string(table.layers) + " and " + std::to_string(table.candidates));
    all.keys.insert(all.keys.end(), table.keys.begin(), table.keys.end());
    const std::int64_t before = all.tokens();
    for (std::size_t b = 1; b < table.offsets.size(); ++b)
      all.offsets.push_back(before + table.offsets[b]);
  }
  const std::size_t size = all.index(all.layers, 0, 0);
  all.ids.reserve(size);
  all.probs.reserve(size);
  all.scale.reserve(size);
  for (std::int32_t layer = 0; layer < all.layers; ++layer) {
    for (const HashTable& table : tables) {
      if (table.batches() == 0) continue;
      const auto rows = [&](const auto& from, auto& to) {
        const auto first = from.begin() + static_cast<std::ptrdiff_t>(table.index(layer, 0, 0));
        const auto last = from.begin() + static_cast<std::ptrdiff_t>(table.index(layer + 1, 0, 0));
        to.insert(to.end(), first, last);
      };
      rows(table.ids, all.ids);
      rows(table.probs, all.probs);
      rows(table.scale, all.scale);
    }
  }
  return all;
}

inline HashTable HashTable::slice(std::int64_t batch) const {
  if (batch < 0 || batch >= batches())
    throw OutOfRange("HashTable: expected a batch from 0 to " + std::to_string(batches() - 1) +
                     ", got " + std::to_string(batch));
  const std::int64_t begin = offsets[static_cast<std::size_t>(batch)];
  const std::int64_t end = offsets[static_cast<std::size_t>(batch) + 1];
  HashTable one;
  one.layers = layers;
  one.candidates = candidates;
  one.keys = {keys[static_cast<std::size_t>(batch)]};
  one.offsets = {0, end - begin};
  const auto rows = [&](const auto& from, auto& to) {
    to.reserve(one.index(layers, 0, 0));
    for (std::int32_t layer = 0; layer < layers; ++layer)
      to.insert(to.end(), from.begin() + static_cast<std::ptrdiff_t>(index(layer, begin, 0)),
                from.begin() + static_cast<std::ptrdiff_t>(index(layer, end, 0)));
  };
  rows(ids, one.ids);
  rows(probs, one.probs);
  rows(scale, one.scale);
  return one;
}

inline void HashTable::append(const HashTable& other) {
  const HashTable both[] = {*this, other};
  *this = concatenate(both);
}

inline void HashTable::validate(std::int32_t experts) const {
  SIDA_EXPECTS(layers >= 0 && candidates >= 0,
               "HashTable: expected layers and candidates >= 0, got " + std::to_string(layers) +
                   " and " + std::to_string(candidates));
  SIDA_EXPECTS(offsets.size() == keys.size() + 1 && offsets.front() == 0 &&
                   std::is_sorted(offsets.begin(), offsets.end()),
               "HashTable: expected " + std::to_string(keys.size() + 1) +
                   " offsets (one more than keys) that begin at 0 and never fall");
  // Sizes come from outside: divide, so that nothing overflows.
  const std::size_t row = static_cast<std::size_t>(std::int64_t{layers} * candidates);
  const bool fits =
      row == 0 ? ids.empty()
               : ids.size() % row == 0 && ids.size() / row == static_cast<std::size_t>(tokens());
  SIDA_EXPECTS(fits && probs.size() == ids.size() && scale.size() == ids.size(),
               "HashTable: expected ids, probs and scale of " + std::to_string(layers) + " x " +
                   std::to_string(tokens()) + " x " + std::to_string(candidates) +
                   " elements, got " + std::to_string(ids.size()) + ", " +
                   std::to_string(probs.size()) + " and " + std::to_string(scale.size()));
  for (const std::int32_t id : ids)
    SIDA_EXPECTS(id >= -1 && id < experts, "HashTable: expected ids from -1 to " +
                                               std::to_string(experts - 1) + ", got " +
                                               std::to_string(id));
  for (const float p : probs)
    SIDA_EXPECTS(p >= 0 && p <= 1,
                 "HashTable: expected probabilities from 0 to 1, got " + std::to_string(p));
}

}  // namespace sida
