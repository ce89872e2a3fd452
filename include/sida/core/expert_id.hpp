// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>
#include <functional>

namespace sida {

/// One expert of one MoE layer. Both indices count from 0; `layer` counts MoE layers only.
struct ExpertId {
  std::int32_t layer = 0;
  std::int32_t expert = 0;

  friend auto operator<=>(const ExpertId&, const ExpertId&) = default;
};

}  // namespace sida

/// @cond
template <>
struct std::hash<sida::ExpertId> {
  std::size_t operator()(const sida::ExpertId& id) const noexcept {
    const auto layer = static_cast<std::uint64_t>(static_cast<std::uint32_t>(id.layer));
    return std::hash<std::uint64_t>{}(layer << 32 | static_cast<std::uint32_t>(id.expert));
  }
};
/// @endcond
