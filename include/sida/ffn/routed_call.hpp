// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "sida/core/tensor_view.hpp"

namespace sida {

/// Which experts a layer call's tokens go to, as the caller has it.
struct Routing {
  ConstTensorView ids;      ///< [T, k] i32 or i64
  ConstTensorView weights;  ///< [T, k] of a floating-point type; choices of weight 0 are left out
  std::span<const std::uint8_t> mask = {};  ///< [T] in RAM, 0 for padding; empty: no padding
  bool skip_padding = false;                ///< leave tokens of padding out
  /// ids (i32) and weights (f32) lie in RAM and are right; else they lie where the backend's arrays
  /// do and are the model's own.
  bool is_foretold = false;
};

/// What became of a call's routing, in RAM.
struct RoutedTokens {
  std::int64_t tokens = 0;
  std::int32_t top_k = 1;
  std::span<const std::int32_t> ids = {};   ///< [T * k], -1 where a choice was left out
  std::span<const float> weights = {};      ///< [T * k], 0 where a choice was left out
  std::span<const std::uint8_t> mask = {};  ///< [T] 0 for padding; or empty

  /// Whether an assignment (token t, choice j), t * top_k + j, is no padding's.
  bool is_token(std::size_t assignment) const noexcept {
    return mask.empty() || mask[assignment / static_cast<std::size_t>(top_k)] != 0;
  }
};

/// Told once of every call whose routing was right.
using Account = std::function<void(const RoutedTokens&)>;

/// Told once of every replay of a CUDA graph that holds the call, with the pass that it was in.
using ReplayAccount = std::function<void(const RoutedTokens&, std::int64_t pass)>;

/// For each of `experts`, whether a token that is no padding goes there. Empty without a mask: all.
inline std::vector<std::uint8_t> counted(const RoutedTokens& routed,
                                         std::span<const std::int32_t> experts) {
  if (routed.mask.empty() || experts.empty()) return {};
  std::vector<std::uint8_t> needed(static_cast<std::size_t>(experts.back()) + 1, 0);
  for (std::size_t a = 0; a < routed.ids.size(); ++a)
    if (routed.ids[a] >= 0 && routed.is_token(a))
      needed[static_cast<std::size_t>(routed.ids[a])] = 1;
  std::vector<std::uint8_t> flags;
  for (const std::int32_t expert : experts)
    flags.push_back(needed[static_cast<std::size_t>(expert)]);
  return flags;
}

/// The experts that some choice went to, ascending.
inline std::vector<std::int32_t> active_experts(const RoutedTokens& routed) {
  std::vector<bool> is_active;
  for (const std::int32_t id : routed.ids) {
    if (id < 0) continue;
    const auto expert = static_cast<std::size_t>(id);
    if (expert >= is_active.size()) is_active.resize(expert + 1);
    is_active[expert] = true;
  }
  std::vector<std::int32_t> experts;
  for (std::size_t expert = 0; expert < is_active.size(); ++expert)
    if (is_active[expert]) experts.push_back(static_cast<std::int32_t>(expert));
  return experts;
}

/// Where all experts of a layer lie, on a backend whose RoutedCall is deferred.
template <class Backend>
class KeptExperts;

/// One layer call on an ExpertFfn, with the tokens grouped by expert where the backend has them.
/// What a layer does with it is the same on every backend; each specialises it:
///
///   RoutedCall(ffn, hidden, routing, account)   begins; account is called now or, where
///                                               `is_deferred`, once the routing is in RAM
///   guess(router)            experts() asks the next layer's router, too (is_deferred only)
///   guessed()                what it said, if it is there
///   experts()                active experts, ascending; may wait for the backend
///   counted()                see above
///   task(expert, weights)    what compute() takes
///   wait(arrival)            what comes next waits for a slab to be there
///   compute(tasks)
///   readers()                a fence: behind it the weights are no longer needed
///   compute(kept)            all experts of the layer, where they lie (is_deferred only)
///   combine(out)             ends the call
template <class Backend>
class RoutedCall;

}  // namespace sida
