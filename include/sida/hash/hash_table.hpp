// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

#include "sida/core/error.hpp"

namespace sida {

/// For every MoE layer and token, which experts will be active and with what scale (paper §3.2).
///
/// Holds one or many batches. Tokens of all batches stand one behind the other: batch b has tokens
/// [offsets[b], offsets[b + 1]), in the order of the flattened [sequences, positions] input, and is
/// found by keys[b]. The arrays are [layers, tokens, candidates], row-major, candidates by falling
/// probability. An id of -1 means that nothing is foretold: a padding token, a layer without a
/// head, fewer candidates than the table is wide.
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
};

}  // namespace sida
