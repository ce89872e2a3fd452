// SPDX-License-Identifier: Apache-2.0
#include "sida/schedule/run_times.hpp"

#include <vector>

#include "support/catch.hpp"

using namespace sida;

TEST_CASE("Times of computation leave waits and the first pass out", "[times]") {
  const std::size_t slab = 100;
  std::vector<TraceEvent> events;
  for (const double start : {0.0, 100.0, 200.0}) {
    const double slow = start == 0 ? 7 : 1;  // the first pass warms up
    events.push_back({TraceKind::compute, {0, -1}, start + 1, start + 1 + 2 * slow, 200, 0});
    events.push_back({TraceKind::stall, {1, -1}, start + 20, start + 25, 0, 0});
    events.push_back({TraceKind::compute, {1, -1}, start + 30, start + 30 + 4 * slow, 400, 0});
    events.push_back({TraceKind::prefetch, {1, 3}, start + 2, start + 90, 100, 0});
    events.push_back({TraceKind::pass, {-1, -1}, start, start + 60 * slow, 0, 0});
  }
  const RunTimes times = run_times(events, 2, slab);
  CHECK(times.expert_seconds == Approx(1));
  CHECK(times.layer_seconds == Approx((60.0 - 6 - 5) / 2));
}

TEST_CASE("One pass is better than none, and of none nothing is known", "[times]") {
  const std::vector<TraceEvent> events{{TraceKind::compute, {0, -1}, 1, 3, 100, 0},
                                       {TraceKind::pass, {-1, -1}, 0, 5, 0, 0}};
  CHECK(run_times(events, 1, 100).expert_seconds == Approx(2));
  CHECK(run_times(events, 1, 100).layer_seconds == Approx(3));
  CHECK(run_times({}, 1, 100).expert_seconds == 0);
  CHECK(run_times({}, 1, 100).layer_seconds == 0);
}
