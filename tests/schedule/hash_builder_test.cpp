// SPDX-License-Identifier: Apache-2.0
#include "sida/schedule/hash_builder.hpp"

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>

#include "support/catch.hpp"
#include "support/pattern_store.hpp"
#include "support/scheduled.hpp"

using namespace sida;
using namespace sida::test;

namespace {

HashTable numbered(int i) { return table_of({{0}}, static_cast<std::uint64_t>(i)); }

using Engine1 = Scheduled<CpuBackend, LookAheadPolicy>;

std::shared_ptr<PatternStore> store() { return std::make_shared<PatternStore>(1, 2, 64); }

}  // namespace

TEST_CASE("At most `ahead` tables are built ahead of the inference thread", "[builder]") {
  Trace trace(100);
  std::atomic<int> built = 0;
  HashBuilder builder([&] { return numbered(built++); }, [](const HashTable&) { return 0; }, 3,
                      trace);
  REQUIRE(eventually([&] { return built == 3; }));
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  CHECK(built == 3);
  CHECK(builder.next()->table.keys[0] == 0);
  REQUIRE(eventually([&] { return built == 4; }));
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  CHECK(built == 4);
  CHECK(trace.events().size() == 4);
}

TEST_CASE("Batches come in order and then end", "[builder]") {
  Engine1 engine(store(), Budget::experts(1));
  int built = 0;
  engine.scheduler.start(
      [&]() -> std::optional<HashTable> {
        if (built == 5) return std::nullopt;
        return numbered(built++);
      },
      2);
  for (std::uint64_t i = 0; i < 5; ++i) {
    REQUIRE(engine.scheduler.next_batch());
    CHECK(engine.scheduler.key() == i);
  }
  CHECK_FALSE(engine.scheduler.next_batch());
  CHECK_FALSE(engine.scheduler.next_batch());
  engine.scheduler.stop();
  engine.scheduler.stop();
  CHECK_THROWS_AS(engine.scheduler.next_batch(), StateError);
  engine.scheduler.start([] { return numbered(7); }, 2);  // and again
  REQUIRE(engine.scheduler.next_batch());
  CHECK(engine.scheduler.key() == 7);
}

TEST_CASE("What the source throws reaches the caller, behind the batches before it", "[builder]") {
  Engine1 engine(store(), Budget::experts(1));
  int built = 0;
  engine.scheduler.start(
      [&]() -> std::optional<HashTable> {
        if (built == 2) throw std::runtime_error("the third batch is broken");
        return numbered(built++);
      },
      8);
  CHECK(engine.scheduler.next_batch());
  CHECK(engine.scheduler.next_batch());
  CHECK_THROWS_WITH(engine.scheduler.next_batch(), "the third batch is broken");
  CHECK_FALSE(engine.scheduler.next_batch());
  CHECK(engine.call(0, {0, 1}) == once({0, 1}, 2));
}

TEST_CASE("A table of another model, made by the source, reaches the caller as an error",
          "[builder]") {
  Engine1 engine(store(), Budget::experts(1));
  engine.scheduler.start([] { return table_of({{0}, {0}}); }, 2);
  CHECK_THROWS_AS(engine.scheduler.next_batch(), InvalidArgument);
}

TEST_CASE("A second hash-building thread is an error", "[builder]") {
  Engine1 engine(store(), Budget::experts(1));
  engine.scheduler.start([] { return numbered(0); }, 1);
  CHECK_THROWS_AS(engine.scheduler.start([] { return numbered(0); }, 1), StateError);
  engine.scheduler.stop();
  CHECK_THROWS_AS(engine.scheduler.start([] { return numbered(0); }, 0), InvalidArgument);
}

TEST_CASE("The source cannot end its own thread, but says so", "[builder]") {
  Engine1 engine(store(), Budget::experts(1));
  engine.scheduler.start(
      [&]() -> std::optional<HashTable> {
        engine.scheduler.stop();
        return std::nullopt;
      },
      1);
  CHECK_THROWS_AS(engine.scheduler.next_batch(), StateError);
}

TEST_CASE("stop() ends a wait for the next batch", "[builder]") {
  Engine1 engine(store(), Budget::experts(1));
  Gate gate;
  engine.scheduler.start(
      [&]() -> std::optional<HashTable> {
        gate.pass();
        return std::nullopt;
      },
      1);
  bool got_a_table = true;
  std::thread waiter([&] {
    try {
      got_a_table = engine.scheduler.next_batch();
    } catch (const StateError&) {  // it began to wait after stop()
      got_a_table = false;
    }
  });
  gate.wait_for_arrival();
  std::thread opener([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
    gate.open();
  });
  engine.scheduler.stop();
  waiter.join();
  opener.join();
  CHECK_FALSE(got_a_table);
}

TEST_CASE("A source that does not return is left behind when patience ends", "[builder]") {
  const auto gate = std::make_shared<Gate>();
  const auto left = std::make_shared<std::atomic<bool>>(false);
  {
    SchedulerOptions options;
    options.source_patience = std::chrono::milliseconds(20);
    Engine1 engine(store(), Budget::experts(1), options);
    engine.scheduler.start(
        [gate, left, built = 0]() mutable -> std::optional<HashTable> {
          if (built++ == 0) return numbered(7);
          gate->pass();
          *left = true;
          return numbered(8);
        },
        2);
    gate->wait_for_arrival();
    CHECK(engine.scheduler.wait_for_batch(std::chrono::seconds(60)));
    REQUIRE(engine.scheduler.next_batch());
    CHECK_FALSE(engine.scheduler.wait_for_batch(std::chrono::milliseconds(1)));
    engine.scheduler.stop();  // comes back
    CHECK(engine.call(0, {0, 1}) == once({0, 1}, 2));
    engine.scheduler.start([] { return numbered(9); }, 2);
    REQUIRE(engine.scheduler.next_batch());
    CHECK(engine.scheduler.key() == 9);
    engine.scheduler.close();
  }
  CHECK_FALSE(*left);
  gate->open();  // the thread comes out with a table for a scheduler that is gone
  CHECK(eventually([&] { return *left && left.use_count() == 1; }));
}
