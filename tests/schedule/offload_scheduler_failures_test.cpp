// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
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

/// A PatternStore with faults that see the bytes which a read is to fill.
class FaultyStore : public PatternStore {
 public:
  using Strike = std::function<void(std::span<std::byte>)>;
  FaultyStore(std::int32_t layers, std::int32_t experts, std::size_t bytes, Strike strike)
      : PatternStore(layers, experts, bytes), strike_(std::move(strike)) {}
  void read(ExpertId id, std::size_t offset, std::span<std::byte> destination) override {
    strike_(destination);
    PatternStore::read(id, offset, destination);
  }

 private:
  Strike strike_;
};

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

TEMPLATE_LIST_TEST_CASE("Whatever goes wrong at whichever read, with tables built ahead",
                        "[scheduler][failures]", Engines) {
  enum class Fault { error, short_read, delay };
  const auto fault = GENERATE(Fault::error, Fault::short_read, Fault::delay);
  const PassNeeds needs = {{0, 1, 2, 3}, {1, 3}};
  constexpr int passes = 3;
  int failing = 0, reads_in_all = 1;
  for (; failing < reads_in_all; ++failing) {  // until a run has fewer reads than that
    std::atomic<int> reads = 0;
    const auto strike = [&](std::span<std::byte> destination) {
      if (reads++ != failing) return;
      if (fault == Fault::delay) {
        std::this_thread::sleep_for(std::chrono::milliseconds(2));
        return;
      }
      const auto read = fault == Fault::error ? 0 : destination.size() / 2;
      std::fill_n(destination.begin(), read, std::byte{0xA5});  // what must never be computed with
      throw IoError("read " + std::to_string(failing) + " failed");
    };
    const auto store = std::make_shared<FaultyStore>(2, 4, slab_bytes, strike);
    Scheduled<typename TestType::backend, typename TestType::policy> engine(
        store, Budget::experts(3), small_chunks(2));
    engine.scheduler.start(
        [&, built = 0]() mutable {
          return built++ < passes ? std::optional(table_of(needs)) : std::nullopt;
        },
        2);
    int errors = 0;
    for (int pass = 0; pass < passes; ++pass) {
      REQUIRE(engine.scheduler.next_batch());
      for (std::int32_t layer = 0; layer < 2; ++layer) {
        const auto& experts = needs[static_cast<std::size_t>(layer)];
        try {
          const auto seen = engine.call(layer, experts);  // CHECK would catch what it throws
          CHECK(seen == once(experts, 4));
        } catch (const IoError& error) {
          CHECK(error.what() == "read " + std::to_string(failing) + " failed");
          ++errors;
          CHECK(engine.call(layer, experts) == once(experts, 4));
        }
      }
      engine.scheduler.end_pass();
    }
    CHECK_FALSE(engine.scheduler.next_batch());
    engine.scheduler.close();
    const auto stats = engine.scheduler.stats();
    const bool struck = reads > failing && fault != Fault::delay;
    CHECK(errors + stats.failed_prefetches <= struck);
    reads_in_all = std::max(reads_in_all, reads.load());
  }
  CHECK(failing > 12);  // each of 6 experts is read in 2 chunks, at least
}

TEST_CASE("A prefetch that fails is forgotten, and the layer brings its expert itself",
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

TEST_CASE("A call that meets a load of the call before is not told that it failed",
          "[scheduler][failures]") {
  Gate gate;
  std::atomic<int> reads_of_1 = 0, reads_of_2 = 0;
  Scheduled<CpuBackend, LruPolicy> engine(
      std::make_shared<PatternStore>(1, 4, slab_bytes,
                                     [&](ExpertId id, std::size_t offset) {
                                       if (offset > 0) return;
                                       if (id.expert == 1 && reads_of_1++ == 0) {
                                         gate.wait_for_arrival();
                                         throw IoError("at once");
                                       }
                                       if (id.expert == 2 && reads_of_2++ == 0) {
                                         gate.pass();
                                         throw IoError("too late");
                                       }
                                     }),
      Budget::experts(4), small_chunks(2));
  CHECK_THROWS_WITH(engine.call(0, {1, 2}), "at once");
  std::thread opener([&] {
    eventually([&] { return engine.scheduler.stats().total.late > 0; });
    gate.open();
  });
  CHECK(engine.call(0, {1, 2}) == once({1, 2}, 4));
  opener.join();
  CHECK(reads_of_2 == 2);
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
