// SPDX-License-Identifier: Apache-2.0
#include "sida/cache/eviction_policy.hpp"

#include <vector>

#include "sida/cache/fifo_policy.hpp"
#include "sida/cache/lfu_policy.hpp"
#include "sida/cache/look_ahead_policy.hpp"
#include "sida/cache/lru_policy.hpp"
#include "support/catch.hpp"

using namespace sida;

namespace {

const ExpertId a{0, 0}, b{0, 1}, c{0, 2};

template <class Policy>
ExpertId victim(const Policy& policy, const std::vector<ExpertId>& candidates,
                const UseForecast& forecast = UseForecast(1, 3)) {
  return candidates[policy.victim(candidates, forecast)];
}

// a, b, c come in this order; a is used twice, then c, then b.
template <class Policy>
Policy after_some_uses() {
  Policy policy;
  for (const ExpertId id : {a, b, c}) policy.inserted(id);
  for (const ExpertId id : {a, a, c, b}) policy.used(id);
  return policy;
}

}  // namespace

TEST_CASE("FIFO evicts what came first, however it was used", "[policy]") {
  auto policy = after_some_uses<FifoPolicy>();
  CHECK(victim(policy, {c, b, a}) == a);
  CHECK(victim(policy, {c, b}) == b);
  policy.evicted(a);
  policy.inserted(a);
  CHECK(victim(policy, {a, c, b}) == b);
}

TEST_CASE("LRU evicts what was used longest ago", "[policy]") {
  auto policy = after_some_uses<LruPolicy>();
  CHECK(victim(policy, {b, c, a}) == a);
  CHECK(victim(policy, {b, c}) == c);
  policy.evicted(a);
  policy.inserted(a);  // brought early: as good as used now
  CHECK(victim(policy, {a, b, c}) == c);
}

TEST_CASE("LFU evicts what was used least, then longest ago", "[policy]") {
  auto policy = after_some_uses<LfuPolicy>();
  CHECK(victim(policy, {a, b, c}) == c);  // once, and before b
  CHECK(victim(policy, {a, b}) == b);
  policy.used(c);
  CHECK(victim(policy, {a, b, c}) == b);
  policy.evicted(a);
  policy.inserted(a);  // its uses are remembered
  CHECK(victim(policy, {a, b, c}) == b);
}

TEST_CASE("LookAhead evicts what is used furthest in the future", "[policy]") {
  LookAheadPolicy policy;
  UseForecast forecast(1, 3);
  forecast.add(a, 5);
  forecast.add(b, 9);
  forecast.add(c, 2);
  CHECK(victim(policy, {a, b, c}, forecast) == b);
  forecast.begin_pass(3);  // c's use is over, and nothing is known of another
  CHECK(victim(policy, {a, b, c}, forecast) == c);
}
