// SPDX-License-Identifier: Apache-2.0
#include <time.h>

#include <chrono>
#include <random>
#include <thread>
#include <vector>

#include "sida/core/error.hpp"
#include "support/catch.hpp"
#include "support/scheduled.hpp"

using namespace sida;
using namespace sida::test;

TEMPLATE_LIST_TEST_CASE("Closing at any moment ends every thread and every wait",
                        "[scheduler][close]", Engines) {
  std::mt19937 random(5);
  for (int round = 0; round < 60; ++round) {
    const auto store = std::make_shared<PatternStore>(2, 8, 512, [](ExpertId, std::size_t) {
      std::this_thread::sleep_for(std::chrono::microseconds(30));
    });
    SchedulerOptions options;
    options.transfers.chunk_bytes = 128;
    Scheduled<typename TestType::backend, typename TestType::policy> engine(
        store, Budget::experts(1 + round % 6), options);
    if (round % 3) engine.scheduler.start([] { return table_of({{0, 1, 2}, {3, 4, 5}}); }, 4);
    std::thread runner([&] {
      try {
        for (;;) {
          if (round % 3)
            engine.scheduler.next_batch();
          else
            engine.scheduler.begin_pass({}, 0, {});
          for (std::int32_t layer = 0; layer < 2; ++layer) engine.call(layer, {0, 2, 4, 6});
          if (round % 2) engine.scheduler.end_pass();
        }
      } catch (const StateError&) {  // the only way out
      }
    });
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 3000));
    std::thread second([&] { engine.scheduler.close(); });
    engine.scheduler.close();
    second.join();
    runner.join();
    CHECK_THROWS_AS(engine.scheduler.begin_pass({}, 0, {}), StateError);
    CHECK_THROWS_AS(engine.scheduler.next_batch(), StateError);
    CHECK_THROWS_AS(engine.scheduler.demand(0, {0}, {}, false), StateError);
    CHECK_THROWS_AS(engine.scheduler.start([] { return table_of({{0}, {0}}); }, 1), StateError);
    const auto total = engine.scheduler.stats().total;
    CHECK(total.hits + total.late + total.misses == total.uses);
  }
}

TEST_CASE("Stopping and starting at any moment leaves no thread and no stale table",
          "[scheduler][close]") {
  std::mt19937 random(6);
  Scheduled<CpuBackend, LookAheadPolicy> engine(std::make_shared<PatternStore>(1, 8, 64),
                                                Budget::experts(4));
  for (int round = 0; round < 100; ++round) {
    std::uint64_t next = static_cast<std::uint64_t>(round) * 1000;
    engine.scheduler.start(
        [&] {
          const auto expert = static_cast<std::int32_t>(next % 8);
          return table_of({{expert}}, next++);
        },
        3);
    const auto batches = static_cast<std::uint64_t>(random() % 5);
    for (std::uint64_t batch = 0; batch < batches; ++batch) {
      REQUIRE(engine.scheduler.next_batch());
      CHECK(engine.scheduler.key() == static_cast<std::uint64_t>(round) * 1000 + batch);
      CHECK(engine.call(0, {static_cast<std::int32_t>(batch % 8)}) ==
            once({static_cast<std::int32_t>(batch % 8)}, 8));
    }
    engine.scheduler.stop();
  }
}

TEST_CASE("Destroying without close, with loads under way, is clean", "[scheduler][close]") {
  for (int round = 0; round < 50; ++round) {
    const auto store = std::make_shared<PatternStore>(1, 8, 512, [](ExpertId, std::size_t) {
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    });
    Scheduled<CpuBackend, LruPolicy> engine(store, Budget::experts(8));
    engine.scheduler.begin_pass(table_of({{0, 1, 2, 3, 4, 5, 6, 7}}), 0, {});
    if (round % 2) engine.scheduler.demand(0, {0, 1}, {}, false);
  }
}

TEST_CASE("Threads without work sleep", "[scheduler][close]") {
  Scheduled<CpuBackend, LookAheadPolicy> engine(std::make_shared<PatternStore>(2, 8, 64),
                                                Budget::experts(3));
  engine.scheduler.start([] { return table_of({{0, 1, 2, 3, 4}, {0, 1, 2, 3, 4}}); }, 16);
  engine.scheduler.next_batch();
  engine.call(0, {0, 1, 2, 3, 4});
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  const auto cpu_seconds = [] {
    ::timespec time{};
    ::clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
  };
  const double before = cpu_seconds();
  std::this_thread::sleep_for(std::chrono::milliseconds(500));
  CHECK(cpu_seconds() - before < 0.05);
}

TEMPLATE_LIST_TEST_CASE("Prefetches of unsure uses come to rest", "[scheduler][close]", Engines) {
  const auto slots = GENERATE(1, 2, 3);
  Scheduled<typename TestType::backend, typename TestType::policy> engine(
      std::make_shared<PatternStore>(2, 8, 64), Budget::experts(slots));
  engine.scheduler.start([] { return table_of({{0, 1, 2}, {0, 1, 2}}, 0, 0.5f); }, 2);
  // Of the two tables ahead and the one that waits for a place, each planned use brings its expert
  // once at most; nobody asks, so nothing else is to move however long one waits.
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  CHECK(engine.scheduler.stats().loads <= 3 * 6);
}
