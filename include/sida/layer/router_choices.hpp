// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "sida/core/error.hpp"
#include "sida/core/tensor_view.hpp"
#include "sida/ffn/token_groups.hpp"
#include "sida/schedule/router_look_ahead.hpp"

namespace sida {

/// @throws InvalidArgument unless `ids` are [tokens, k] i32 or i64.
inline void check_choices(const ConstTensorView& ids, std::int64_t tokens) {
  SIDA_EXPECTS(ids.shape.size() == 2 && ids.shape[0] == tokens &&
                   (ids.type == DataType::i32 || ids.type == DataType::i64),
               "the next layer's expert ids: expected [" + std::to_string(tokens) +
                   ", k] i32 or i64, got " + ids.describe());
}

/// The experts that `ids` [T, k] in RAM name, each once with its best rank; those that only padding
/// (mask[t] == 0) names, and ids outside [0, experts), are left out.
inline std::vector<RouterChoice> choices_of(const ConstTensorView& ids,
                                            std::span<const std::uint8_t> mask,
                                            std::int32_t experts) {
  std::vector<RouterChoice> choices;
  std::vector<bool> is_named(static_cast<std::size_t>(experts));
  for (std::int64_t rank = 0; rank < ids.shape[1]; ++rank) {
    for (std::int64_t token = 0; token < ids.shape[0]; ++token) {
      if (!mask.empty() && mask[static_cast<std::size_t>(token)] == 0) continue;
      const std::int64_t id = detail::load_index(ids, token * ids.shape[1] + rank);
      if (id < 0 || id >= experts || is_named[static_cast<std::size_t>(id)]) continue;
      is_named[static_cast<std::size_t>(id)] = true;
      choices.push_back({static_cast<std::int32_t>(id), static_cast<std::int32_t>(rank)});
    }
  }
  return choices;
}

}  // namespace sida
