// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "sida/ffn/expert_ffn_cpu.hpp"
#include "sida/ffn/routed_call.hpp"
#include "sida/ffn/token_groups.hpp"

namespace sida {

/// On the CPU tokens are grouped at once, and ids out of range raise before anything else happens.
template <std::derived_from<CpuBackend> B>
class RoutedCall<B> {
 public:
  static constexpr bool is_deferred = false;

  /// @throws as group_tokens() and ExpertFfn::begin().
  RoutedCall(ExpertFfn<B>& ffn, const ConstTensorView& hidden, const Routing& routing,
             const Account& account)
      : ffn_(ffn),
        weights_(routing.weights),
        groups_(group_tokens(routing.ids, routing.weights, ffn.config().experts,
                             routing.skip_padding ? routing.mask : decltype(routing.mask){})) {
    ffn_.begin(hidden, groups_);
    ids_.assign(groups_.row_of.size(), -1);
    scale_.assign(ids_.size(), 0.0f);
    for (std::size_t a = 0; a < ids_.size(); ++a) {
      if (groups_.row_of[a] < 0) continue;
      const auto assignment = static_cast<std::int64_t>(a);
      ids_[a] = static_cast<std::int32_t>(detail::load_index(routing.ids, assignment));
      scale_[a] = static_cast<float>(detail::load_real(routing.weights, assignment));
    }
    routed_ = {groups_.tokens, groups_.top_k, ids_, scale_, routing.mask};
    account(routed_);
  }
  RoutedCall(const RoutedCall&) = delete;
  RoutedCall& operator=(const RoutedCall&) = delete;

  const std::vector<std::int32_t>& experts() const noexcept { return groups_.experts; }
  std::vector<std::uint8_t> counted() const { return sida::counted(routed_, groups_.experts); }

  ExpertTask task(std::int32_t expert, const ExpertWeights& weights) const {
    const auto found = std::ranges::lower_bound(groups_.experts, expert);
    const auto group = static_cast<std::size_t>(found - groups_.experts.begin());
    return {weights, groups_.offsets[group], groups_.offsets[group + 1], expert};
  }
  void compute(std::span<const ExpertTask> tasks) { ffn_.compute(tasks); }
  CpuBackend::Fence readers() noexcept { return {}; }
  void combine(const TensorView& out) { ffn_.combine(weights_, out); }

 private:
  ExpertFfn<B>& ffn_;
  ConstTensorView weights_;
  TokenGroups groups_;
  std::vector<std::int32_t> ids_;
  std::vector<float> scale_;
  RoutedTokens routed_;
};

}  // namespace sida
