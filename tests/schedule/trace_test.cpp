// SPDX-License-Identifier: Apache-2.0
#include "sida/schedule/trace.hpp"

#include "support/catch.hpp"

using namespace sida;

TEST_CASE("A trace keeps the latest events, oldest first", "[trace]") {
  Trace trace(3);
  for (int i = 0; i < 5; ++i) trace.add({TraceKind::compute, {i, -1}, 0, 0, 0, 0});
  const auto events = trace.events();
  REQUIRE(events.size() == 3);
  CHECK(events[0].id.layer == 2);
  CHECK(events[2].id.layer == 4);
  trace.clear();
  CHECK(trace.events().empty());
}

TEST_CASE("A trace of capacity 0 keeps nothing", "[trace]") {
  Trace trace(0);
  trace.add({});
  CHECK(trace.events().empty());
}
