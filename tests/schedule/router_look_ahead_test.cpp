// SPDX-License-Identifier: Apache-2.0
#include "sida/schedule/router_look_ahead.hpp"

#include <atomic>
#include <memory>
#include <utility>
#include <vector>

#include "sida/core/error.hpp"
#include "support/catch.hpp"
#include "support/scheduled.hpp"

using namespace sida;
using namespace sida::test;

namespace router_look_ahead_test {
namespace {

constexpr std::size_t slab_bytes = 256;

using LookingAhead = Scheduled<CpuBackend, LookAheadPolicy>;

SchedulerOptions one_thread() {
  SchedulerOptions options;
  options.transfers.threads = 1;
  options.transfers.chunk_bytes = slab_bytes / 4;
  return options;
}

/// Choices of falling rank.
std::vector<RouterChoice> choices(const std::vector<std::int32_t>& experts) {
  std::vector<RouterChoice> ranked;
  for (const std::int32_t expert : experts)
    ranked.push_back({expert, static_cast<std::int32_t>(ranked.size())});
  return ranked;
}

void call(LookingAhead& engine, std::int32_t layer, const std::vector<std::int32_t>& experts) {
  REQUIRE(engine.call(layer, experts) ==
          once(experts, static_cast<std::size_t>(engine.store->experts())));
}

}  // namespace

TEST_CASE("Statistics of look-ahead worked out by hand", "[look-ahead]") {
  LookingAhead engine(std::make_shared<PatternStore>(3, 6, slab_bytes), Budget::experts(6),
                      one_thread());
  auto& scheduler = engine.scheduler;
  scheduler.begin_pass({}, 0, {});
  call(engine, 0, {0});
  scheduler.look_ahead(1, choices({4, 2, 5}));
  for (const std::int32_t expert : {4, 2, 5})
    REQUIRE(eventually([&] { return engine.is_resident({1, expert}); }));
  call(engine, 1, {1, 2, 4});  // 2 and 4 are there, 1 is not, 5 is not needed
  scheduler.look_ahead(2, choices({0}));
  REQUIRE(eventually([&] { return engine.is_resident({2, 0}); }));
  scheduler.end_pass();  // the last layer is not called

  auto stats = scheduler.stats();
  CHECK(stats.layers[1].hits == 2);
  CHECK(stats.layers[1].misses == 1);
  CHECK(stats.layers[1].look_ahead.uses == 3);
  CHECK(stats.layers[1].look_ahead.foretold == 3);
  CHECK(stats.layers[1].look_ahead.foretold_uses == 2);
  CHECK(stats.layers[0].look_ahead.uses == 0);
  CHECK(stats.total.look_ahead.foretold == 3);  // of calls that took place
  CHECK(stats.look_ahead_loads == 4);
  CHECK(stats.prefetches == 4);
  CHECK(stats.loads == 6);
  CHECK(stats.look_ahead_used == 2);
  CHECK(stats.look_ahead_wasted == 0);  // 5 and 0 may still be read

  scheduler.close();
  stats = scheduler.stats();
  CHECK(stats.wasted == 2);
  CHECK(stats.look_ahead_wasted == 2);
  scheduler.reset_stats();
  CHECK(scheduler.stats().total.look_ahead.uses == 0);
  CHECK(scheduler.stats().look_ahead_loads == 0);
  CHECK(scheduler.stats().look_ahead_used == 0);
}

TEST_CASE("What only padding needs counts as no use that was foretold", "[look-ahead]") {
  LookingAhead engine(std::make_shared<PatternStore>(2, 4, slab_bytes), Budget::experts(4),
                      one_thread());
  engine.scheduler.begin_pass({}, 0, {});
  call(engine, 0, {0});
  engine.scheduler.look_ahead(1, choices({1, 2}));
  const std::vector<std::uint8_t> counted = {1, 0};
  engine.call(1, {1, 2}, counted);
  const auto ahead = engine.scheduler.stats().layers[1].look_ahead;
  CHECK(ahead.uses == 1);
  CHECK(ahead.foretold == 2);
  CHECK(ahead.foretold_uses == 1);
}

TEST_CASE("Guesses of a rank that come out wrong bring nothing after a while, but are measured",
          "[look-ahead]") {
  LookingAhead engine(std::make_shared<PatternStore>(2, 100, slab_bytes), Budget::experts(4),
                      one_thread());
  for (int pass = 0; pass < 40; ++pass) {
    const std::int32_t wrong = 50 + pass, right = pass;
    engine.scheduler.begin_pass({}, 0, {});
    call(engine, 0, {0});
    engine.scheduler.look_ahead(1, choices({wrong, right}));
    REQUIRE(eventually([&] { return engine.is_resident({1, right}); }));
    // The thread loads one after the other, the surest first.
    if (pass == 0) CHECK(engine.is_resident({1, wrong}));
    if (pass >= 10) CHECK(!engine.is_resident({1, wrong}));
    call(engine, 1, {right});
    engine.scheduler.end_pass();
  }
  const auto stats = engine.scheduler.stats();
  CHECK(stats.layers[1].look_ahead.foretold == 80);
  CHECK(stats.layers[1].look_ahead.foretold_uses == 40);
  CHECK(stats.layers[1].hits == 40);
}

TEST_CASE("How right guesses are is learnt apart by what a table says of them", "[look-ahead]") {
  LookingAhead engine(std::make_shared<PatternStore>(2, 100, slab_bytes), Budget::experts(6),
                      one_thread());
  for (int pass = 0; pass < 40; ++pass) {
    const std::int32_t right = pass, wrong = 50 + pass;
    HashTable table = table_of({{0}, {right}});
    table.probs[1] = 0.3f;  // not enough to be brought for the table's sake
    engine.scheduler.begin_pass(table, 0, {});
    call(engine, 0, {0});
    // Of one rank: half of its guesses are right, those of which the table speaks.
    engine.scheduler.look_ahead(1, std::vector<RouterChoice>{{wrong, 0}, {right, 0}});
    REQUIRE(eventually([&] { return engine.is_resident({1, right}); }));
    if (pass >= 10) CHECK(!engine.is_resident({1, wrong}));
    call(engine, 1, {right});
    engine.scheduler.end_pass();
  }
  CHECK(engine.scheduler.stats().layers[1].hits == 40);
}

TEST_CASE("A guess does not move out what its layer has always needed", "[look-ahead]") {
  LookingAhead engine(std::make_shared<PatternStore>(2, 8, slab_bytes), Budget::experts(2),
                      one_thread());
  for (int pass = 0; pass < 8; ++pass) {
    engine.scheduler.begin_pass({}, 0, {});
    call(engine, 0, {0});
    call(engine, 1, {0});
    engine.scheduler.end_pass();
  }
  engine.scheduler.begin_pass({}, 0, {});
  {
    auto demand = engine.scheduler.demand(0, {0}, {}, false);
    const auto leases = demand.next_ready();
    REQUIRE(leases.size() == 1);
    engine.scheduler.look_ahead(1, choices({5}));
  }
  call(engine, 1, {0});
  CHECK(engine.scheduler.stats().look_ahead_loads == 0);
  CHECK(engine.scheduler.stats().total.misses == 2);
}

TEST_CASE("Guesses for one layer do not make way for one another", "[look-ahead]") {
  LookingAhead engine(std::make_shared<PatternStore>(2, 8, slab_bytes), Budget::experts(2),
                      one_thread());
  engine.scheduler.begin_pass({}, 0, {});
  call(engine, 0, {0});
  engine.scheduler.look_ahead(1, choices({1, 2, 3}));
  REQUIRE(eventually([&] { return engine.is_resident({1, 2}); }));
  call(engine, 1, {1, 2});
  CHECK(engine.scheduler.stats().total.hits == 2);
  CHECK(engine.scheduler.stats().look_ahead_loads == 2);
}

TEST_CASE("Look-ahead moves out nothing that is needed as soon", "[look-ahead]") {
  LookingAhead engine(std::make_shared<PatternStore>(2, 8, slab_bytes), Budget::experts(4),
                      one_thread());
  engine.scheduler.begin_pass(table_of({{0, 1}, {2, 3}}), 0, {});
  for (const ExpertId id : {ExpertId{0, 0}, ExpertId{0, 1}, ExpertId{1, 2}, ExpertId{1, 3}})
    REQUIRE(eventually([&] { return engine.is_resident(id); }));
  {
    auto demand = engine.scheduler.demand(0, {0, 1}, {}, false);
    const auto leases = demand.next_ready();
    REQUIRE(leases.size() == 2);
    engine.scheduler.look_ahead(1, choices({4, 5, 6, 7}));  // no slot is to be had for them
    CHECK(engine.scheduler.stats().look_ahead_loads == 0);
  }
  call(engine, 1, {2, 3});
  CHECK(engine.scheduler.stats().total.hits == 4);
}

TEST_CASE("Look-ahead waits behind what the layer at hand needs", "[look-ahead]") {
  Gate gate;
  std::atomic<int> order = 0, demanded_at = -1, foretold_at = -1;
  const auto store =
      std::make_shared<PatternStore>(2, 4, slab_bytes, [&](ExpertId id, std::size_t offset) {
        if (id == ExpertId{0, 0}) gate.pass();
        if (offset != 0) return;
        if (id == ExpertId{0, 1}) demanded_at = order++;
        if (id == ExpertId{1, 2}) foretold_at = order++;
      });
  LookingAhead engine(store, Budget::experts(4), one_thread());
  engine.scheduler.begin_pass({}, 0, {});
  {
    auto demand = engine.scheduler.demand(0, {0, 1}, {}, false);
    engine.scheduler.look_ahead(1, choices({2}));
    gate.open();
    while (!demand.next_ready().empty()) {
    }
  }
  call(engine, 1, {2});
  CHECK(demanded_at == 0);
  CHECK(foretold_at == 1);
}

TEST_CASE("A wrong guess under way is given up when its layer begins", "[look-ahead]") {
  Gate gate;
  const auto store =
      std::make_shared<PatternStore>(2, 4, slab_bytes, [&](ExpertId id, std::size_t offset) {
        if (id == ExpertId{1, 3} && offset > 0) gate.pass();
      });
  LookingAhead engine(store, Budget::experts(4), one_thread());
  engine.scheduler.begin_pass({}, 0, {});
  call(engine, 0, {0});
  engine.scheduler.look_ahead(1, choices({3, 2}));
  gate.wait_for_arrival();  // 3 is half-way
  {
    auto demand = engine.scheduler.demand(1, {1}, {}, false);
    gate.open();
    CHECK(demand.next_ready().size() == 1);
  }
  REQUIRE(eventually([&] { return engine.scheduler.stats().look_ahead_cancelled == 1; }));
  const auto stats = engine.scheduler.stats();
  CHECK(!engine.is_resident({1, 3}));
  CHECK(!engine.is_resident({1, 2}));  // was not begun
  CHECK(stats.failed_prefetches == 0);
  CHECK(stats.look_ahead_loads == 1);
  CHECK(stats.bytes_moved < 3 * static_cast<std::int64_t>(slab_bytes));
}

TEST_CASE("A right guess under way is late, and used", "[look-ahead]") {
  Gate gate;
  const auto store =
      std::make_shared<PatternStore>(2, 4, slab_bytes, [&](ExpertId id, std::size_t offset) {
        if (id == ExpertId{1, 3} && offset > 0) gate.pass();
      });
  LookingAhead engine(store, Budget::experts(4), one_thread());
  engine.scheduler.begin_pass({}, 0, {});
  call(engine, 0, {0});
  engine.scheduler.look_ahead(1, choices({3}));
  gate.wait_for_arrival();
  {
    auto demand = engine.scheduler.demand(1, {3}, {}, false);
    gate.open();
    CHECK(demand.next_ready().size() == 1);
  }
  const auto stats = engine.scheduler.stats();
  CHECK(stats.layers[1].late == 1);
  CHECK(stats.loads == 2);
  CHECK(stats.look_ahead_used == 1);
  CHECK(stats.look_ahead_cancelled == 0);
}

TEST_CASE("A guess is forgotten with its pass", "[look-ahead]") {
  LookingAhead engine(std::make_shared<PatternStore>(3, 4, slab_bytes), Budget::experts(2),
                      one_thread());
  engine.scheduler.begin_pass({}, 0, {});
  call(engine, 0, {0, 1});
  {
    auto demand = engine.scheduler.demand(1, {0, 1}, {}, false);
    const auto leases = demand.next_ready();
    engine.scheduler.look_ahead(2, choices({2}));
  }
  engine.scheduler.begin_pass({}, 0, {});
  call(engine, 2, {3});  // the very layer, in another pass
  CHECK(engine.scheduler.stats().total.look_ahead.foretold == 0);
}

TEST_CASE("A guess whose load fails is not brought again, and the layer that needs it is told",
          "[look-ahead][failures]") {
  std::atomic<int> reads = 0;
  const auto store =
      std::make_shared<PatternStore>(2, 4, slab_bytes, [&](ExpertId id, std::size_t) {
        if (id.layer == 1 && ++reads < 3) throw IoError("read failed");
      });
  LookingAhead engine(store, Budget::experts(4), one_thread());
  engine.scheduler.begin_pass({}, 0, {});
  call(engine, 0, {0});
  engine.scheduler.look_ahead(1, choices({1}));
  REQUIRE(eventually([&] { return engine.scheduler.stats().failed_prefetches == 1; }));
  CHECK(engine.scheduler.stats().look_ahead_cancelled == 0);
  CHECK_THROWS_AS(engine.call(1, {1}), IoError);
  CHECK(reads == 2);
  call(engine, 1, {1});
}

TEST_CASE("A guess out of range is refused", "[look-ahead]") {
  LookingAhead engine(std::make_shared<PatternStore>(2, 4, slab_bytes), Budget::experts(4));
  engine.scheduler.begin_pass({}, 0, {});
  CHECK_THROWS_AS(engine.scheduler.look_ahead(2, choices({0})), OutOfRange);
  CHECK_THROWS_AS(engine.scheduler.look_ahead(1, choices({0, 4})), OutOfRange);
  CHECK_THROWS_AS(engine.scheduler.look_ahead(1, choices({-1})), OutOfRange);
  call(engine, 1, {1});
  CHECK(engine.scheduler.stats().total.look_ahead.foretold == 0);
}

TEST_CASE("Look-ahead is of use only where experts have no slot", "[look-ahead]") {
  const auto store = std::make_shared<PatternStore>(2, 4, slab_bytes);
  LookingAhead few(store, Budget::experts(7));
  few.scheduler.begin_pass({}, 0, {});
  CHECK(few.scheduler.wants_look_ahead());
  few.scheduler.begin_pass(table_of({{0}, {1}}), 0, {});
  CHECK(few.scheduler.wants_look_ahead());
  few.scheduler.end_pass();
  few.scheduler.resize(Budget::fraction(1));
  few.scheduler.begin_pass({}, 0, {});
  CHECK(!few.scheduler.wants_look_ahead());
}

TEST_CASE("Closing while a guess is under way ends it", "[look-ahead]") {
  for (int round = 0; round < 20; ++round) {
    LookingAhead engine(std::make_shared<PatternStore>(2, 8, slab_bytes), Budget::experts(8));
    engine.scheduler.begin_pass({}, 0, {});
    call(engine, 0, {0});
    engine.scheduler.look_ahead(1, choices({0, 1, 2, 3, 4, 5}));
    engine.scheduler.close();
    const auto stats = engine.scheduler.stats();
    CHECK(stats.look_ahead_used == 0);
    CHECK(stats.look_ahead_wasted <= stats.look_ahead_loads);
  }
}

}  // namespace router_look_ahead_test
