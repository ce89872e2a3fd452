// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "sida/core/error.hpp"

namespace sida {

/// Key by which a hash table finds its batch: 64 bits of the token ids and the attention mask.
///
/// `mask` is nonzero for tokens; an empty one means that there is no padding, and gives the same
/// key as a mask of ones. Equal on every machine, in every process. The ids of padding count too:
/// exact routing computes them. @throws InvalidArgument if the sizes differ.
inline std::uint64_t batch_key(std::span<const std::int64_t> ids,
                               std::span<const std::uint8_t> mask = {}) {
  SIDA_EXPECTS(mask.empty() || mask.size() == ids.size(),
               "batch_key: expected a mask of " + std::to_string(ids.size()) +
                   " elements or none, got " + std::to_string(mask.size()));
  // FNV-1a on words, each first scrambled by splitmix64: FNV alone leaves the low bits of the key
  // a function of the low bits of the ids.
  const auto scramble = [](std::uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
  };
  std::uint64_t key = 0xcbf29ce484222325u ^ scramble(ids.size());
  for (std::size_t i = 0; i < ids.size(); ++i) {
    const std::uint64_t token = mask.empty() || mask[i] != 0;
    const std::uint64_t word = static_cast<std::uint64_t>(ids[i]) * 2 + token;
    key = (key ^ scramble(word + 0x9e3779b97f4a7c15u)) * 0x100000001b3u;
  }
  return scramble(key);
}

}  // namespace sida
