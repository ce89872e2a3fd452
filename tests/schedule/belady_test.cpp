// SPDX-License-Identifier: Apache-2.0
//
// With tables that foretell everything, LookAhead moves little more than the fewest bytes possible.

#include <algorithm>
#include <cstdint>
#include <future>
#include <random>
#include <vector>

#include "sida/cache/look_ahead_policy.hpp"
#include "sida/cache/lru_policy.hpp"
#include "sida/schedule/belady.hpp"
#include "sida/schedule/replay.hpp"
#include "support/catch.hpp"
#include "support/scheduled.hpp"

using namespace sida;
using namespace sida::test;

namespace {

constexpr int layers = 4, experts = 24;

// Batches that each use `active` experts a layer, some experts far more often than others.
std::vector<PassNeeds> made_up(int batches, int active, std::uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<PassNeeds> passes;
  for (int batch = 0; batch < batches; ++batch) {
    PassNeeds needs(layers);
    for (auto& layer : needs) {
      while (static_cast<int>(layer.size()) < active) {
        const auto a = static_cast<std::int32_t>(random() % experts);
        const auto b = static_cast<std::int32_t>(random() % experts);
        const std::int32_t expert = std::min(a, b);
        if (std::find(layer.begin(), layer.end(), expert) == layer.end()) layer.push_back(expert);
      }
      std::sort(layer.begin(), layer.end());
    }
    passes.push_back(needs);
  }
  return passes;
}

template <class Policy>
CacheStats run(const std::vector<PassNeeds>& passes, std::int64_t slots, std::size_t ahead) {
  Scheduled<CpuBackend, Policy> engine(std::make_shared<PatternStore>(layers, experts, 64),
                                       Budget::experts(slots));
  std::size_t built = 0;
  std::promise<void> all_built;
  if (ahead > 0)
    engine.scheduler.start(
        [&]() -> std::optional<HashTable> {
          if (built < passes.size()) return table_of(passes[built++]);
          all_built.set_value();
          return std::nullopt;
        },
        ahead);
  if (ahead > passes.size()) all_built.get_future().wait();  // full knowledge from the beginning
  for (const PassNeeds& needs : passes) {
    if (ahead > 0)
      engine.scheduler.next_batch();
    else
      engine.scheduler.begin_pass({}, 0, {});
    for (std::int32_t layer = 0; layer < layers; ++layer)
      engine.call(layer, needs[static_cast<std::size_t>(layer)]);
    engine.scheduler.end_pass();
  }
  return engine.scheduler.stats();
}

struct Case {
  int active;
  std::int64_t slots;
};
constexpr Case cases[] = {{4, 19}, {4, 48}, {12, 10}, {12, 19}, {12, 48}};

// A table for each batch, named by its number.
HashTable recorded(const std::vector<PassNeeds>& passes) {
  std::vector<HashTable> tables;
  for (std::size_t batch = 0; batch < passes.size(); ++batch)
    tables.push_back(table_of(passes[batch], batch));
  return concatenate(tables);
}

}  // namespace

// In imagined time: where slots are short, what must wait for a lease to end depends on the
// threads.
TEST_CASE("On a link that never rests LookAhead moves at most 10 % more than Belady", "[belady]") {
  constexpr int passes = 400;  // the first loads are not yet held against Belady's
  for (const auto& [active, slots] : cases) {
    CAPTURE(active, slots);
    const HashTable table = recorded(made_up(passes, active, 3));
    ReplayOptions options;
    options.experts = experts;
    options.slab_bytes = 64;
    options.memory = Budget::experts(slots);
    options.ahead = passes + 1;
    options.bytes_per_second = 64;
    const CacheStats stats = replay<LookAheadPolicy>(table, table, options).stats;
    const std::int64_t best = belady_loads(uses_of(table), slots);
    CAPTURE(best, stats.loads);
    CHECK(stats.loads >= best);
    CHECK(static_cast<double>(stats.loads) <= 1.10 * static_cast<double>(best));
  }
}

TEST_CASE("With full knowledge nothing is a miss, and LookAhead loads less than LRU", "[belady]") {
  for (const auto& [active, slots] : cases) {
    CAPTURE(active, slots);
    const auto passes = made_up(100, active, 3);
    const CacheStats stats = run<LookAheadPolicy>(passes, slots, passes.size() + 1);
    const CacheStats lru = run<LruPolicy>(passes, slots, 0);
    CAPTURE(stats.loads, lru.loads);
    CHECK(stats.total.uses == 100 * layers * active);
    CHECK(stats.total.misses == 0);
    CHECK(stats.loads >= belady_loads(uses_of(recorded(passes)), slots));
    CHECK(stats.loads < lru.loads);
  }
}

TEST_CASE("Without any table LookAhead misses less than LRU on the walk through the layers",
          "[belady]") {
  const auto passes = made_up(100, 12, 4);
  CHECK(run<LookAheadPolicy>(passes, 36, 0).loads < run<LruPolicy>(passes, 36, 0).loads * 9 / 10);
}

// All experts of a layer but one are used next at the same step: whichever the policy likes best to
// evict, another that leaves in any case makes way.
TEST_CASE("A link that has to bring as much as it can is hardly ever at rest", "[belady]") {
  constexpr std::int32_t many = 128, walk = 6;
  std::vector<HashTable> tables;
  for (std::int32_t batch = 0; batch < 24; ++batch) {
    PassNeeds needs(walk);
    for (std::int32_t layer = 0; layer < walk; ++layer)
      for (std::int32_t expert = 0; expert < many; ++expert)
        if (expert != (7 * (batch % 8) + 31 * layer) % many)
          needs[static_cast<std::size_t>(layer)].push_back(expert);
    tables.push_back(table_of(needs, static_cast<std::uint64_t>(batch)));
  }
  const HashTable table = concatenate(tables);
  for (const std::int64_t slots : {154, 384}) {
    ReplayOptions options;
    options.experts = many;
    options.slab_bytes = 64;
    options.memory = Budget::experts(slots);
    options.bytes_per_second = 64 * 200;
    options.layer_seconds = 0.1;
    const ReplayResult result = replay<LookAheadPolicy>(table, table, options);
    const double moving = static_cast<double>(result.stats.bytes_moved) / options.bytes_per_second;
    CAPTURE(slots, result.seconds, moving);
    CHECK(result.seconds <= 1.15 * moving);
  }
}

// Half of a layer's experts are needed each time, so that Belady's rule keeps some for the next
// pass; what it lets go in time for the next layer is not enough to keep the link at work.
TEST_CASE("Slots are spared where layers wait for a link at rest, at a price that is bounded",
          "[belady]") {
  constexpr std::int32_t many = 64, walk = 6;
  std::mt19937 random(5);
  std::vector<HashTable> tables;
  for (std::uint64_t batch = 0; batch < 60; ++batch) {
    tables.push_back(table_of(random_needs(random, walk, many), batch));
  }
  const HashTable table = concatenate(tables);
  ReplayOptions options;
  options.experts = many;
  options.slab_bytes = 64;
  options.memory = Budget::experts(96);
  options.bytes_per_second = 64 * 84;
  options.layer_seconds = 0.1;
  const ReplayResult result = replay<LookAheadPolicy>(table, table, options);
  const double moving = static_cast<double>(result.stats.bytes_moved) / options.bytes_per_second;
  const auto fewest = static_cast<double>(belady_loads(uses_of(table), result.slots));
  CAPTURE(result.seconds, moving, result.stats.loads, fewest);
  CHECK(result.seconds <= 1.05 * moving);
  CHECK(static_cast<double>(result.stats.loads) <= 1.10 * fewest);
}
