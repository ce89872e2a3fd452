// SPDX-License-Identifier: Apache-2.0
#include <atomic>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "sida/core/error.hpp"
#include "support/catch.hpp"
#include "support/scheduled.hpp"

using namespace sida;
using namespace sida::test;

namespace {

constexpr std::size_t slab_bytes = 256;

SchedulerOptions small_chunks(int threads) {
  SchedulerOptions options;
  options.transfers.threads = threads;
  options.transfers.chunk_bytes = slab_bytes / 2;
  return options;
}

}  // namespace

TEMPLATE_LIST_TEST_CASE("Whichever read fails, a call that needs it says so and the next is right",
                        "[scheduler][failures]", Engines) {
  const auto slots = GENERATE(1, 3, 8);
  const bool foretold = GENERATE(false, true);
  const PassNeeds needs = {{0, 1, 2, 3}, {1, 3}};
  for (int failing = 0; failing < 14; ++failing) {
    std::atomic<int> reads = 0;
    const auto store = std::make_shared<PatternStore>(2, 4, slab_bytes, [&](ExpertId, std::size_t) {
      if (reads++ == failing) throw IoError("read " + std::to_string(failing) + " failed");
    });
    Scheduled<typename TestType::backend, typename TestType::policy> engine(
        store, Budget::experts(slots), small_chunks(2));
    int errors = 0;
    for (int pass = 0; pass < 3; ++pass) {
      engine.scheduler.begin_pass(foretold ? std::optional(table_of(needs)) : std::nullopt, 0, {});
      for (std::int32_t layer = 0; layer < 2; ++layer) {
        const auto& experts = needs[static_cast<std::size_t>(layer)];
        try {
          const auto seen = engine.call(layer, experts);
          CHECK(seen == once(experts, 4));
        } catch (const IoError& error) {
          CHECK(error.what() == "read " + std::to_string(failing) + " failed");
          ++errors;
          CHECK(engine.call(layer, experts) == once(experts, 4));
        }
      }
      engine.scheduler.end_pass();
    }
    CHECK(errors + engine.scheduler.stats().failed_prefetches <= 1);
    if (!foretold && failing < 12) CHECK(errors == 1);  // each of 6 experts is read in 2 chunks
    CHECK(engine.cache.resident().size() <= static_cast<std::size_t>(slots));
  }
}

TEST_CASE("A prefetch that fails is forgotten; the layer brings its expert itself",
          "[scheduler][failures]") {
  std::atomic<bool> broken = true;
  const auto store =
      std::make_shared<PatternStore>(1, 4, slab_bytes, [&](ExpertId id, std::size_t) {
        if (broken && id.expert == 2) throw IoError("gone");
      });
  Scheduled<CpuBackend, LookAheadPolicy> engine(store, Budget::experts(4), small_chunks(1));
  engine.scheduler.begin_pass(table_of({{2, 3}}), 0, {});
  REQUIRE(eventually([&] { return engine.is_resident({0, 3}); }));
  CHECK(engine.scheduler.stats().failed_prefetches == 1);

  SECTION("It raises if it fails again") {
    CHECK_THROWS_WITH(engine.call(0, {2, 3}), "gone");
    broken = false;
    CHECK(engine.call(0, {2, 3}) == once({2, 3}, 4));
  }
  SECTION("And works if it does not") {
    broken = false;
    CHECK(engine.call(0, {2, 3}) == once({2, 3}, 4));
    CHECK(engine.scheduler.stats().total.late == 1);
  }
}

TEST_CASE("A layer that waits for a prefetch that fails has it tried once more",
          "[scheduler][failures]") {
  Gate gate;
  std::atomic<int> reads = 0;
  const auto store = std::make_shared<PatternStore>(1, 2, slab_bytes, [&](ExpertId, std::size_t) {
    if (reads++ > 0) return;
    gate.pass();
    throw IoError("once");
  });
  Scheduled<CpuBackend, LookAheadPolicy> engine(store, Budget::experts(2), small_chunks(1));
  engine.scheduler.begin_pass(table_of({{1}}), 0, {});
  gate.wait_for_arrival();
  auto demand = engine.scheduler.demand(0, {1}, {}, false);
  gate.open();
  const auto leases = demand.next_ready();
  REQUIRE(leases.size() == 1);
  CHECK(store->holds({0, 1}, leases[0].slab()));
  CHECK(engine.scheduler.stats().failed_prefetches == 1);
}

TEST_CASE("Exceptions of other types pass through as they are", "[scheduler][failures]") {
  const auto store = std::make_shared<PatternStore>(1, 2, slab_bytes, [](ExpertId, std::size_t) {
    throw std::overflow_error("of the store's own");
  });
  Scheduled<CpuBackend, LruPolicy> engine(store, Budget::experts(2));
  CHECK_THROWS_AS(engine.call(0, {0}), std::overflow_error);
}

TEST_CASE("A policy that fails fails the call, not the program", "[scheduler][failures]") {
  struct Moody {
    static constexpr std::string_view name() { return "moody"; }
    void inserted(ExpertId) {}
    void used(ExpertId) {}
    void evicted(ExpertId) {}
    std::size_t victim(std::span<const ExpertId>, const UseForecast&) const {
      throw std::runtime_error("cannot choose");
    }
  };
  Scheduled<CpuBackend, Moody> engine(std::make_shared<PatternStore>(1, 4, slab_bytes),
                                      Budget::experts(1));
  CHECK(engine.call(0, {0}) == once({0}, 4));
  CHECK_THROWS_WITH(engine.call(0, {1}), "cannot choose");
  CHECK(engine.call(0, {0}) == once({0}, 4));
}
