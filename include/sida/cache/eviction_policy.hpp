// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "sida/cache/use_forecast.hpp"
#include "sida/core/expert_id.hpp"

namespace sida {

/// Which resident expert gives way when a slot is needed. A policy is told of everything that
/// happens to residency and asked for a victim; it never sees leased or loading experts. The cache
/// calls it under its lock, so a policy needs none and calls nothing of the cache.
///
/// - `name()`: how the policy is called in Python and in statistics
/// - `inserted(id)`: the expert has become resident
/// - `used(id)`: a layer leased it
/// - `evicted(id)`: it is no longer resident
/// - `victim(candidates, forecast)`: the index of the candidate to evict; there is at least one
///
/// PrefetchQueue asks the same policy before it brings an expert early. `inserted`, `used` and
/// `evicted` do not throw but for want of memory.
// clang-format off
template <class P>
concept EvictionPolicy = std::default_initializable<P> && requires(
    P policy, ExpertId id, std::span<const ExpertId> candidates, const UseForecast& forecast) {
  { P::name() } -> std::convertible_to<std::string_view>;
  policy.inserted(id);
  policy.used(id);
  policy.evicted(id);
  { policy.victim(candidates, forecast) } -> std::convertible_to<std::size_t>;
};
// clang-format on

}  // namespace sida
