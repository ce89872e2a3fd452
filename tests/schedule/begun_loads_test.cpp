// SPDX-License-Identifier: Apache-2.0
// Loads that only have to be begun: by who waits for them, who goes on while they are under way.
#include <atomic>
#include <cstdint>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <utility>
#include <vector>

#include "sida/core/error.hpp"
#include "support/catch.hpp"
#include "support/scheduled.hpp"
#include "support/streamed_backend.hpp"

using namespace sida;
using namespace sida::test;

namespace begun_loads_test {
namespace {

constexpr std::size_t slab_bytes = 1000;
constexpr std::int32_t layers = 3, experts = 24;

bool all_pinned(ExpertId) { return true; }
bool even_pinned(ExpertId id) { return id.expert % 2 == 0; }

std::vector<std::int32_t> first(std::int32_t count) {
  std::vector<std::int32_t> ids(static_cast<std::size_t>(count));
  std::iota(ids.begin(), ids.end(), 0);
  return ids;
}

template <class Policy>
struct Streamed {
  Streamed(const Budget& budget, const PartlyPinnedStore::IsPinned& is_pinned = all_pinned,
           Haste haste = Haste::none, PatternStore::OnRead on_read = {})
      : backend(haste),
        store(std::make_shared<PartlyPinnedStore>(layers, experts, slab_bytes, is_pinned,
                                                  std::move(on_read))),
        cache(backend, store, budget),
        scheduler(backend, cache, options()),
        computing(backend.make_stream()) {}
  static SchedulerOptions options() {
    SchedulerOptions options;
    options.transfers.chunk_bytes = 300;
    return options;
  }

  // As a layer on a GPU: experts are read in the order of a stream, which nobody waits for here.
  // Returns the sizes of the waves.
  std::vector<std::size_t> call(std::int32_t layer, const std::vector<std::int32_t>& wanted) {
    std::vector<std::size_t> waves;
    auto demand = scheduler.demand(layer, wanted, {}, false);
    for (;;) {
      auto leases = demand.next_ready();
      if (leases.empty()) return waves;
      waves.push_back(leases.size());
      StreamedBackend::Fence arrival;
      for (const auto& lease : leases) arrival.add(lease.arrival());
      if (!backend.is_complete(arrival)) {
        scheduler.add_stall(layer, backend.fence(computing), arrival);
        backend.wait(computing, arrival);
      }
      for (const auto& lease : leases)
        backend.call(computing, [this, id = lease.id(), slab = lease.slab()] {
          ++(store->holds(id, slab) ? right : wrong);
        });
      const auto readers = backend.fence(computing);
      for (auto& lease : leases) lease.end_after(readers);
    }
  }
  void finish() { backend.synchronize(backend.fence(computing)); }

  StreamedBackend backend;
  std::shared_ptr<PartlyPinnedStore> store;
  ExpertCache<StreamedBackend, Policy> cache;
  OffloadScheduler<StreamedBackend, Policy> scheduler;
  StreamedBackend::Stream computing;
  int right = 0, wrong = 0;
};

}  // namespace

TEMPLATE_TEST_CASE("Experts on their way are read whole, with any number of slots", "[scheduler]",
                   FifoPolicy, LruPolicy, LfuPolicy, LookAheadPolicy) {
  const int slots = GENERATE(1, 2, 5, 40, layers * experts);
  const Haste haste = GENERATE(Haste::none, Haste::all, Haste::some);
  const bool is_all_pinned = GENERATE(true, false);
  Streamed<TestType> engine(Budget::experts(slots), is_all_pinned ? all_pinned : even_pinned,
                            haste);
  std::mt19937 random(11);
  int expected = 0;
  for (int pass = 0; pass < 12; ++pass) {
    const PassNeeds needs = random_needs(random, layers, experts);
    // Every other pass is foretold; of these every third wrongly.
    const PassNeeds foretold = pass % 3 == 0 ? random_needs(random, layers, experts) : needs;
    engine.scheduler.begin_pass(pass % 2 ? std::optional(table_of(foretold)) : std::nullopt, 0, {});
    for (std::int32_t layer = 0; layer < layers; ++layer) {
      const auto& wanted = needs[static_cast<std::size_t>(layer)];
      const auto waves = engine.call(layer, wanted);
      REQUIRE(std::accumulate(waves.begin(), waves.end(), std::size_t{0}) == wanted.size());
      expected += static_cast<int>(wanted.size());
    }
    engine.scheduler.end_pass();
  }
  engine.finish();
  CHECK(engine.right == expected);
  CHECK(engine.wrong == 0);
  const CacheStats stats = engine.scheduler.stats();
  CHECK(stats.total.uses == expected);
  CHECK(stats.total.uses == stats.total.hits + stats.total.late + stats.total.misses);
  const std::int64_t rest = stats.loads * static_cast<std::int64_t>(slab_bytes) - stats.bytes_moved;
  CHECK(rest >= 0);  // of prefetches that are under way
  CHECK(rest <= engine.options().transfers.threads * static_cast<std::int64_t>(slab_bytes));
}

TEST_CASE("Who needs experts goes on while they are on their way", "[scheduler]") {
  Streamed<LruPolicy> engine(Budget::experts(40));
  engine.call(0, first(4));
  engine.finish();
  const std::size_t before = engine.backend.copied();
  // What was there first, of the others the half that comes soonest, then few at once.
  CHECK(engine.call(0, first(24)) == std::vector<std::size_t>{4, 10, 5, 5});
  CHECK(engine.call(1, first(8)) == std::vector<std::size_t>{8});
  CHECK(engine.backend.copied() == before);
  engine.finish();
  CHECK(engine.backend.copied() == before + 28 * slab_bytes);
  CHECK(engine.right == 36);
}

TEST_CASE("With few slots a load waits for the readers of its slot, the host does not",
          "[scheduler]") {
  Streamed<LruPolicy> engine(Budget::experts(3));
  engine.call(0, first(24));
  CHECK(engine.backend.copied() == 0);
  engine.finish();
  CHECK(engine.right == 24);
  CHECK(engine.wrong == 0);
}

TEST_CASE("Stalls and loads are those of the streams, not of the host", "[scheduler]") {
  Streamed<LruPolicy> engine(Budget::experts(40));
  engine.call(0, first(3));
  engine.call(1, first(2));
  const auto stats = engine.scheduler.stats();  // waits
  CHECK(stats.layers[0].stall_seconds == Approx(3 * slab_bytes * 1e-9));
  CHECK(stats.layers[1].stall_seconds == Approx(2 * slab_bytes * 1e-9));
  CHECK(stats.total.stall_seconds == Approx(5 * slab_bytes * 1e-9));
  auto events = engine.scheduler.traced();
  std::erase_if(events,
                [](const TraceEvent& event) { return event.kind != TraceKind::demand_load; });
  REQUIRE(events.size() == 5);
  for (std::size_t i = 1; i < events.size(); ++i) CHECK(events[i].begin >= events[i - 1].end);
  for (const TraceEvent& event : events)
    CHECK(event.lane == Streamed<LruPolicy>::options().transfers.threads);
  engine.scheduler.reset_stats();
  CHECK(engine.scheduler.stats().total.stall_seconds == 0);
}

TEST_CASE("A load that cannot begin is told to the caller, and the next call is right",
          "[scheduler]") {
  Streamed<LruPolicy> engine(Budget::experts(5));
  engine.call(0, {1});
  engine.backend.fail_next_copy();
  CHECK_THROWS_WITH(engine.call(0, {1, 2, 3}), "a copy that was to fail");
  CHECK(engine.call(0, {1, 2, 3}).size() > 0);
  engine.finish();
  CHECK(engine.wrong == 0);
}

TEST_CASE("A failed read of what is not pinned is told to the caller too", "[scheduler]") {
  std::atomic<bool> fails = true;
  Streamed<LruPolicy> engine(Budget::experts(5), even_pinned, Haste::none,
                             [&](ExpertId, std::size_t) {
                               if (fails) throw IoError("injected");
                             });
  CHECK_THROWS_WITH(engine.call(0, {0, 1, 2}), "injected");
  fails = false;
  engine.call(0, {0, 1, 2, 5});
  engine.finish();
  CHECK(engine.wrong == 0);
}

TEST_CASE("What is foretold and under way is joined, and the rest of it only begun",
          "[scheduler]") {
  Gate gate;
  Streamed<LookAheadPolicy> engine(Budget::experts(5), [](ExpertId id) { return id.layer == 0; });
  // A reader of slots holds the prefetch up: it waits for its slot.
  auto held = engine.backend.make_stream();
  engine.backend.call(held, [&] { gate.pass(); });
  for (const std::int32_t e : {0, 1, 2, 3, 4})
    engine.cache.commit(std::move(*engine.cache.reserve({0, e})), engine.backend.fence(held));
  engine.scheduler.begin_pass(table_of({{5}, {}, {}}), 0, {});
  gate.wait_for_arrival();  // in its first chunk
  {
    auto demand = engine.scheduler.demand(0, {5}, {}, false);
    gate.open();
    auto leases = demand.next_ready();
    REQUIRE(leases.size() == 1);
    CHECK_FALSE(engine.backend.is_complete(leases[0].arrival()));
    CHECK(engine.backend.copied() < slab_bytes);
    engine.backend.synchronize(leases[0].arrival());
    CHECK(engine.store->holds({0, 5}, leases[0].slab()));
  }
  const CacheStats stats = engine.scheduler.stats();
  CHECK(stats.loads == 1);
  CHECK(stats.total.late == 1);
}

TEST_CASE("A slot that is free again before anybody waits for it is seen", "[scheduler]") {
  Gate gate;
  Streamed<LookAheadPolicy> engine(Budget::experts(1));
  auto held = engine.backend.make_stream();
  engine.backend.call(held, [&] { gate.pass(); });
  engine.cache.commit(std::move(*engine.cache.reserve({0, 0})), engine.backend.fence(held));
  engine.scheduler.begin_pass(table_of({{}, {5}, {}}), 0, {});
  gate.wait_for_arrival();  // the only slot is on its way to another layer
  auto demand = engine.scheduler.demand(0, {3}, {}, false);
  gate.open();
  REQUIRE(eventually([&] { return engine.cache.resident() == std::vector<ExpertId>{{1, 5}}; }));
  const auto leases = demand.next_ready();
  REQUIRE(leases.size() == 1);
  CHECK(leases[0].id() == ExpertId{0, 3});
}

TEST_CASE("Leases that are all held by others are told, not waited for", "[scheduler]") {
  Streamed<LruPolicy> engine(Budget::experts(2));
  engine.call(0, {0, 1});
  engine.finish();
  const auto a = engine.cache.try_lease({0, 0}), b = engine.cache.try_lease({0, 1});
  CHECK_THROWS_AS(engine.call(0, {2}), StateError);
}

}  // namespace begun_loads_test
