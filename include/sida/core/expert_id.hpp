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

/// The expert's place in order of layer and expert, with `experts` of them in each layer.
constexpr std::size_t index_of(ExpertId id, std::int32_t experts) noexcept {
  return static_cast<std::size_t>(id.layer) * static_cast<std::size_t>(experts) +
         static_cast<std::size_t>(id.expert);
}

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
