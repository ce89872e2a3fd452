// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "expert_kernels.hpp"
#include "sida/core/error.hpp"
#include "sida/ffn/routed_call.hpp"

namespace sida::cuda {

/// A call's routing as the GPU writes it for the host, in memory of somebody else's: ids [T, k],
/// then weights [T, k].
class RoutingMemory {
 public:
  static std::size_t bytes(std::int64_t tokens, std::int32_t top_k) noexcept {
    return 2 * sizeof(float) * static_cast<std::size_t>(tokens) * static_cast<std::size_t>(top_k);
  }

  RoutingMemory() = default;
  /// `memory` holds bytes().
  RoutingMemory(std::byte* memory, std::int64_t tokens, std::int32_t top_k) noexcept
      : ids_(reinterpret_cast<std::int32_t*>(memory)), tokens_(tokens), top_k_(top_k) {}

  std::int32_t* ids() const noexcept { return ids_; }
  float* weights() const noexcept { return reinterpret_cast<float*>(ids_ + assignments()); }
  std::size_t bytes() const noexcept { return bytes(tokens_, top_k_); }

  /// To be read when the GPU has written it; `mask` fits, or is empty.
  RoutedTokens routed(std::span<const std::uint8_t> mask) const noexcept {
    return {tokens_, top_k_, {ids_, assignments()}, {weights(), assignments()}, mask};
  }
  /// @throws OutOfRange naming the first id that is no expert's.
  void expect_experts(std::int32_t experts) const {
    for (std::size_t a = 0; a < assignments(); ++a)
      if (ids_[a] != left_out && (ids_[a] < 0 || ids_[a] >= experts))
        throw OutOfRange("expert ids: expected 0 to " + std::to_string(experts - 1) + ", got " +
                         std::to_string(ids_[a]) + " for token " +
                         std::to_string(a / static_cast<std::size_t>(top_k_)));
  }
  /// For an account: -1 where a choice was left out. @throws as expect_experts().
  RoutedTokens accounted(std::int32_t experts, std::span<const std::uint8_t> mask) const {
    expect_experts(experts);
    std::replace(ids_, ids_ + assignments(), left_out, -1);
    return routed(mask);
  }

 private:
  std::size_t assignments() const noexcept {
    return static_cast<std::size_t>(tokens_) * static_cast<std::size_t>(top_k_);
  }

  std::int32_t* ids_ = nullptr;
  std::int64_t tokens_ = 0;
  std::int32_t top_k_ = 1;
};

}  // namespace sida::cuda
