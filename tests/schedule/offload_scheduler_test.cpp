// SPDX-License-Identifier: Apache-2.0
#include "sida/schedule/offload_scheduler.hpp"

#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "support/catch.hpp"
#include "support/scheduled.hpp"

using namespace sida;
using namespace sida::test;

namespace offload_scheduler_test {
namespace {

constexpr std::size_t slab_bytes = 256;

SchedulerOptions one_thread() {
  SchedulerOptions options;
  options.transfers.threads = 1;
  options.transfers.chunk_bytes = slab_bytes / 4;
  return options;
}

void check_consistent(const LayerStats& stats) {
  CHECK(stats.hits + stats.late + stats.misses == stats.uses);
}

}  // namespace

TEMPLATE_LIST_TEST_CASE("A layer gets every expert that it needs, with any number of slots",
                        "[scheduler]", Engines) {
  const auto slots = GENERATE(1, 2, 3, 5, 16);
  Scheduled<typename TestType::backend, typename TestType::policy> engine(
      std::make_shared<PatternStore>(2, 8, slab_bytes), Budget::experts(slots));
  std::mt19937 random(7);
  for (int pass = 0; pass < 20; ++pass) {
    engine.scheduler.begin_pass({}, 0, {});
    const PassNeeds needs = random_needs(random, 2, 8);
    for (std::int32_t layer = 0; layer < 2; ++layer) {
      const auto& experts = needs[static_cast<std::size_t>(layer)];
      REQUIRE(engine.call(layer, experts) == once(experts, 8));
    }
  }
  const auto stats = engine.scheduler.stats();
  check_consistent(stats.total);
  CHECK(stats.bytes_moved == stats.loads * static_cast<std::int64_t>(slab_bytes));
  CHECK(stats.passes == 20);
}

TEST_CASE("Statistics of a trace worked out by hand: demand only, LRU", "[scheduler]") {
  Scheduled<CpuBackend, LruPolicy> engine(std::make_shared<PatternStore>(2, 3, slab_bytes),
                                          Budget::experts(2), one_thread());
  auto& scheduler = engine.scheduler;
  scheduler.begin_pass({}, 0, {});
  engine.call(0, {0, 1});  // miss, miss: holds 00 01
  engine.call(1, {0});     // miss: 00 goes, holds 01 10
  scheduler.end_pass();
  scheduler.begin_pass({}, 0, {});
  engine.call(0, {0, 1});  // 01 hits; 00 misses, and 10 goes
  engine.call(1, {0});     // miss
  scheduler.end_pass();

  const auto stats = scheduler.stats();
  CHECK(stats.layers[0].uses == 4);
  CHECK(stats.layers[0].hits == 1);
  CHECK(stats.layers[0].misses == 3);
  CHECK(stats.layers[1].uses == 2);
  CHECK(stats.layers[1].misses == 2);
  CHECK(stats.total.uses == 6);
  CHECK(stats.total.hits == 1);
  CHECK(stats.total.late == 0);
  CHECK(stats.total.misses == 5);
  CHECK(stats.total.calls == 4);
  CHECK(stats.loads == 5);
  CHECK(stats.prefetches == 0);
  CHECK(stats.wasted == 0);
  CHECK(stats.bytes_moved == 5 * static_cast<std::int64_t>(slab_bytes));
  CHECK(stats.tables == 0);

  scheduler.reset_stats();
  CHECK(scheduler.stats().total.uses == 0);
  CHECK(scheduler.stats().loads == 0);
}

TEST_CASE("Statistics of a trace worked out by hand: hit, late, miss, wasted", "[scheduler]") {
  Gate gate;
  const auto store =
      std::make_shared<PatternStore>(1, 6, slab_bytes, [&](ExpertId id, std::size_t) {
        if (id.expert == 1) gate.pass();
      });
  Scheduled<CpuBackend, LookAheadPolicy> engine(store, Budget::experts(6), one_thread());
  auto& scheduler = engine.scheduler;
  scheduler.begin_pass(table_of({{0, 1, 2}}), 0, {});
  gate.wait_for_arrival();  // 0 is resident, 1 under way, 2 queued
  {
    auto demand = scheduler.demand(0, {0, 1, 2, 3}, {}, false);
    CHECK(demand.next_ready().size() == 1);  // 0, while the others are on their way
    std::thread opener([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(30));
      gate.open();
    });
    int others = 0;
    for (auto leases = demand.next_ready(); !leases.empty();) {
      others += static_cast<int>(leases.size());
      leases.clear();
      leases = demand.next_ready();
    }
    CHECK(others == 3);
    opener.join();
  }
  scheduler.begin_pass(table_of({{4, 5}}), 1, {});
  REQUIRE(eventually([&] { return engine.is_resident({0, 5}); }));
  engine.call(0, {4});
  scheduler.end_pass();

  auto stats = scheduler.stats();
  CHECK(stats.total.uses == 5);
  CHECK(stats.total.hits == 2);    // 0 and 4
  CHECK(stats.total.late == 2);    // 1 and 2
  CHECK(stats.total.misses == 1);  // 3
  CHECK(stats.loads == 6);
  CHECK(stats.prefetches == 4);  // 0, 1, 4, 5
  CHECK(stats.wasted == 0);      // 5 may still be read
  CHECK(stats.total.stall_seconds >= 0.02);
  CHECK(stats.tables == 2);

  scheduler.close();  // 5 was never read
  stats = scheduler.stats();
  CHECK(stats.wasted == 1);
  CHECK(stats.bytes_wasted == static_cast<std::int64_t>(slab_bytes));
}

TEST_CASE("An expert under way for a later pass is late, not missed", "[scheduler]") {
  Gate gate;
  const auto store =
      std::make_shared<PatternStore>(1, 2, slab_bytes, [&](ExpertId, std::size_t) { gate.pass(); });
  Scheduled<CpuBackend, LookAheadPolicy> engine(store, Budget::experts(2), one_thread());
  int built = 0;
  engine.scheduler.start(
      [&]() -> std::optional<HashTable> {
        if (built++ == 2) return std::nullopt;
        return table_of(built == 1 ? PassNeeds{{}} : PassNeeds{{1}});
      },
      4);
  REQUIRE(engine.scheduler.next_batch());  // a pass for which nothing is foretold
  gate.wait_for_arrival();                 // the next one's expert is being loaded
  {
    auto demand = engine.scheduler.demand(0, {0, 1}, {}, false);
    gate.open();
    while (!demand.next_ready().empty()) continue;
  }
  CHECK(engine.scheduler.stats().total.late == 1);
  CHECK(engine.scheduler.stats().total.misses == 1);
}

TEST_CASE("An expert that was brought early and evicted unread is wasted", "[scheduler]") {
  Scheduled<CpuBackend, LruPolicy> engine(std::make_shared<PatternStore>(1, 4, slab_bytes),
                                          Budget::experts(2), one_thread());
  engine.scheduler.begin_pass(table_of({{0, 1}}), 0, {});
  REQUIRE(eventually([&] { return engine.is_resident({0, 1}); }));
  engine.call(0, {2, 3});
  CHECK(engine.scheduler.stats().wasted == 2);
  CHECK(engine.scheduler.stats().total.misses == 2);
}

TEST_CASE("Experts that only padding needs count in no rate", "[scheduler]") {
  Scheduled<CpuBackend, LruPolicy> engine(std::make_shared<PatternStore>(1, 4, slab_bytes),
                                          Budget::experts(4));
  const std::uint8_t counted[] = {1, 0, 1};
  CHECK(engine.call(0, {0, 1, 2}, counted) == once({0, 1, 2}, 4));
  CHECK(engine.call(0, {0, 1, 2}, counted) == once({0, 1, 2}, 4));
  const auto total = engine.scheduler.stats().total;
  CHECK(total.uses == 4);
  CHECK(total.misses == 2);
  CHECK(total.hits == 2);
}

TEST_CASE("A demand overtakes prefetches, also between the chunks of one under way",
          "[scheduler]") {
  Gate gate;
  std::mutex mutex;
  std::vector<std::pair<ExpertId, std::size_t>> reads;
  const auto store =
      std::make_shared<PatternStore>(2, 4, slab_bytes, [&](ExpertId id, std::size_t offset) {
        {
          const std::lock_guard lock(mutex);
          reads.emplace_back(id, offset / (slab_bytes / 4));
        }
        if (id == ExpertId{1, 0} && offset == 0) gate.pass();
      });
  Scheduled<CpuBackend, LookAheadPolicy> engine(store, Budget::experts(8), one_thread());
  engine.scheduler.begin_pass(table_of({{}, {0, 1}}), 0, {});
  gate.wait_for_arrival();  // the first chunk of a prefetch is being read, another one is queued
  {
    auto demand = engine.scheduler.demand(0, {2, 3}, {}, false);
    gate.open();
    while (!demand.next_ready().empty()) continue;
  }
  REQUIRE(eventually([&] { return engine.is_resident({1, 1}); }));
  std::vector<std::pair<ExpertId, std::size_t>> expected = {{{1, 0}, 0}};
  for (const ExpertId id : {ExpertId{0, 2}, {0, 3}})
    for (std::size_t chunk = 0; chunk < 4; ++chunk) expected.emplace_back(id, chunk);
  for (std::size_t chunk = 1; chunk < 4; ++chunk) expected.emplace_back(ExpertId{1, 0}, chunk);
  for (std::size_t chunk = 0; chunk < 4; ++chunk) expected.emplace_back(ExpertId{1, 1}, chunk);
  CHECK(reads == expected);
}

TEST_CASE("What is resident is handed out while what is missing is on its way", "[scheduler]") {
  Gate gate;
  const auto store =
      std::make_shared<PatternStore>(1, 4, slab_bytes, [&](ExpertId id, std::size_t) {
        if (id.expert == 3) gate.pass();
      });
  Scheduled<CpuBackend, LruPolicy> engine(store, Budget::experts(4));
  engine.call(0, {0, 1});
  auto demand = engine.scheduler.demand(0, {0, 1, 3}, {}, false);
  CHECK(demand.next_ready().size() == 2);  // although 3 cannot come
  gate.wait_for_arrival();
  gate.open();
  CHECK(demand.next_ready().size() == 1);
  CHECK(demand.next_ready().empty());
}

TEST_CASE("Keeping the leases of a wave is an error, not a wait for ever", "[scheduler]") {
  Scheduled<CpuBackend, LruPolicy> engine(std::make_shared<PatternStore>(1, 4, slab_bytes),
                                          Budget::experts(2));
  {
    auto demand = engine.scheduler.demand(0, {0, 1, 2, 3}, {}, false);
    auto first = demand.next_ready();
    auto second = first.size() < 2 ? demand.next_ready() : decltype(first)();
    CHECK_THROWS_AS(demand.next_ready(), StateError);
  }
  CHECK(engine.call(0, {0, 1, 2, 3}) == once({0, 1, 2, 3}, 4));
}

TEST_CASE("One layer call at a time, of experts that exist", "[scheduler]") {
  Scheduled<CpuBackend, LruPolicy> engine(std::make_shared<PatternStore>(1, 4, slab_bytes),
                                          Budget::experts(2));
  {
    const auto demand = engine.scheduler.demand(0, {0}, {}, false);
    CHECK_THROWS_AS(engine.scheduler.demand(0, {1}, {}, false), StateError);
    CHECK_THROWS_AS(engine.scheduler.resize(Budget::experts(1)), StateError);
  }
  CHECK_THROWS_AS(engine.call(0, {4}), OutOfRange);
  CHECK_THROWS_AS(engine.call(1, {0}), OutOfRange);
  CHECK(engine.scheduler.stats().total.calls == 1);
  CHECK(engine.call(0, {1}) == once({1}, 4));
}

TEST_CASE("A demand that ends early leaves nothing behind", "[scheduler]") {
  Scheduled<CpuBackend, LruPolicy> engine(std::make_shared<PatternStore>(1, 8, slab_bytes),
                                          Budget::experts(2));
  for (int i = 0; i < 200; ++i) {
    auto demand = engine.scheduler.demand(0, {0, 1, 2, 3, 4, 5, 6, 7}, {}, false);
    for (int wave = 0; wave < i % 4; ++wave) demand.next_ready();
  }
  CHECK(engine.call(0, {0, 1, 2, 3}) == once({0, 1, 2, 3}, 8));
}

TEST_CASE("A pass with a table of its own is prefetched while others wait", "[scheduler]") {
  Scheduled<CpuBackend, LookAheadPolicy> engine(std::make_shared<PatternStore>(1, 8, slab_bytes),
                                                Budget::experts(8));
  auto& scheduler = engine.scheduler;
  int built = 0;
  scheduler.start(
      [&]() -> std::optional<HashTable> {
        if (built == 2) return std::nullopt;
        return table_of({{built++}}, 10);
      },
      4);
  REQUIRE(eventually([&] { return engine.is_resident({0, 1}); }));
  scheduler.begin_pass(table_of({{7}}), 5, {});
  CHECK(scheduler.key() == 5);
  REQUIRE(eventually([&] { return engine.is_resident({0, 7}); }));
  engine.call(0, {7});
  scheduler.end_pass();
  CHECK(scheduler.table() == nullptr);
  for (std::int32_t expert = 0; expert < 2; ++expert) {
    REQUIRE(scheduler.next_batch());
    REQUIRE(scheduler.table());
    CHECK(scheduler.key() == 10);
    engine.call(0, {expert});
  }
  CHECK_FALSE(scheduler.next_batch());
  CHECK(scheduler.stats().total.hits == 3);
}

TEST_CASE("Prefetch still works after tables were given up", "[scheduler]") {
  Scheduled<CpuBackend, LookAheadPolicy> engine(std::make_shared<PatternStore>(1, 8, slab_bytes),
                                                Budget::experts(8));
  engine.scheduler.start([] { return table_of({{0}}); }, 4);
  REQUIRE(engine.scheduler.next_batch());
  engine.scheduler.stop();
  engine.scheduler.begin_pass(table_of({{5}}), 0, {});
  CHECK(eventually([&] { return engine.is_resident({0, 5}); }));
}

TEST_CASE("A table of another model is refused", "[scheduler]") {
  Scheduled<CpuBackend, LruPolicy> engine(std::make_shared<PatternStore>(2, 4, slab_bytes),
                                          Budget::experts(2));
  CHECK_THROWS_AS(engine.scheduler.begin_pass(table_of({{0}}), 0, {}), InvalidArgument);
  CHECK_THROWS_AS(engine.scheduler.begin_pass(table_of({{0}, {4}}), 0, {}), InvalidArgument);
  HashTable two = table_of({{0}, {1}});
  two.append(two);
  CHECK_THROWS_AS(engine.scheduler.begin_pass(two, 0, {}), InvalidArgument);
}

TEMPLATE_LIST_TEST_CASE("The budget can change between calls", "[scheduler]", Engines) {
  Scheduled<CountingBackend, typename TestType::policy> engine(
      std::make_shared<PatternStore>(1, 8, slab_bytes), Budget::experts(2));
  int built = 0;
  engine.scheduler.start(
      [&]() -> std::optional<HashTable> {
        if (built == 30) return std::nullopt;
        return table_of({{built++ % 8, 7}});
      },
      4);
  for (int pass = 0; engine.scheduler.next_batch(); ++pass) {
    const std::int32_t expert = pass % 8;
    const std::vector<std::int32_t> needs =
        expert == 7 ? std::vector<std::int32_t>{7} : std::vector<std::int32_t>{expert, 7};
    CHECK(engine.call(0, needs) == once(needs, 8));
    engine.scheduler.resize(Budget::experts(1 + pass % 4));
    CHECK(engine.backend.allocated() == engine.cache.capacity_bytes());
  }
  CHECK(engine.backend.peak() <= 4 * slab_bytes);
}

TEST_CASE("Slots that were spared are no more than there are once the budget shrinks",
          "[scheduler]") {
  Scheduled<CpuBackend, LookAheadPolicy> engine(std::make_shared<PatternStore>(1, 16, slab_bytes),
                                                Budget::experts(8));
  const auto pass = [&](int first) {
    std::vector<std::int32_t> needs;
    for (int i = 0; i < 8; ++i) needs.push_back((first + i) % 16);
    engine.scheduler.begin_pass(table_of({needs}), 0, {});
    REQUIRE(engine.call(0, needs) == once(needs, 16));
  };
  for (int shrinking = 0; shrinking < 10; ++shrinking) {
    engine.scheduler.resize(Budget::experts(8));
    // Nothing that a layer needs is there, and the link is at rest: it comes to spare half of 8.
    for (int i = 0; i < 10; ++i) pass(8 * i);
    engine.scheduler.resize(Budget::experts(2));
    pass(0);
  }
}

TEMPLATE_LIST_TEST_CASE("Any thread timing gives each call its experts, and statistics that add up",
                        "[scheduler]", Engines) {
  const auto seed = GENERATE(1u, 2u, 3u);
  std::mutex mutex;
  std::mt19937 delays(seed);
  const auto store = std::make_shared<PatternStore>(3, 8, slab_bytes, [&](ExpertId, std::size_t) {
    std::chrono::microseconds delay{0};
    {
      const std::lock_guard lock(mutex);
      delay = std::chrono::microseconds(delays() % 4 ? 0 : delays() % 300);
    }
    std::this_thread::sleep_for(delay);
  });
  std::mt19937 random(seed + 100);
  std::vector<PassNeeds> passes(25, PassNeeds(3)), foretold = passes;
  for (std::size_t pass = 0; pass < passes.size(); ++pass) {
    for (std::size_t layer = 0; layer < 3; ++layer) {
      for (std::int32_t e = 0; e < 8; ++e) {
        const bool needed = random() % 3 == 0;
        if (needed) passes[pass][layer].push_back(e);
        if (needed != (random() % 4 == 0)) foretold[pass][layer].push_back(e);  // often wrong
      }
    }
  }
  SchedulerOptions options;
  options.transfers.threads = 3;
  options.transfers.chunk_bytes = 100;
  Scheduled<typename TestType::backend, typename TestType::policy> engine(
      store, Budget::experts(seed == 1 ? 2 : 7), options);
  std::size_t built = 0;
  engine.scheduler.start(
      [&]() -> std::optional<HashTable> {
        if (built == foretold.size()) return std::nullopt;
        return table_of(foretold[built++]);
      },
      5);
  for (const PassNeeds& needs : passes) {
    REQUIRE(engine.scheduler.next_batch());
    for (std::int32_t layer = 0; layer < 3; ++layer)
      REQUIRE(engine.call(layer, needs[static_cast<std::size_t>(layer)]) ==
              once(needs[static_cast<std::size_t>(layer)], 8));
    engine.scheduler.end_pass();
  }
  engine.scheduler.close();
  const auto stats = engine.scheduler.stats();
  check_consistent(stats.total);
  for (const LayerStats& layer : stats.layers) check_consistent(layer);
  CHECK(stats.wasted <= stats.prefetches);
  CHECK(stats.prefetches <= stats.loads);
  CHECK(stats.total.uses - stats.total.hits <= stats.loads);
}

}  // namespace offload_scheduler_test
