// SPDX-License-Identifier: Apache-2.0
//
// A replay does in imagined time what the scheduler does with threads and bytes.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <random>
#include <thread>
#include <vector>

#include "sida/cache/fifo_policy.hpp"
#include "sida/cache/lfu_policy.hpp"
#include "sida/cache/look_ahead_policy.hpp"
#include "sida/cache/lru_policy.hpp"
#include "sida/cache/throttled_store.hpp"
#include "sida/schedule/replay.hpp"
#include "support/catch.hpp"
#include "support/scheduled.hpp"

using namespace sida;
using namespace sida::test;

namespace replay_test {
namespace {

constexpr std::int32_t layers = 3, experts = 12;
constexpr std::size_t slab_bytes = 1 << 14;

// Each batch uses up to `active` experts a layer; low ones oftener.
std::vector<PassNeeds> made_up(int batches, int active, std::uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<PassNeeds> passes;
  for (int batch = 0; batch < batches; ++batch) {
    PassNeeds needs(layers);
    for (auto& layer : needs) {
      for (int i = 0; i < active; ++i)
        layer.push_back(
            static_cast<std::int32_t>(std::min(random() % experts, random() % experts)));
      std::sort(layer.begin(), layer.end());
      layer.erase(std::unique(layer.begin(), layer.end()), layer.end());
    }
    passes.push_back(needs);
  }
  return passes;
}

HashTable recorded(const std::vector<PassNeeds>& passes) {
  std::vector<HashTable> tables;
  for (std::size_t i = 0; i < passes.size(); ++i) tables.push_back(table_of(passes[i], i));
  return concatenate(tables);
}

ReplayOptions options_for(std::int64_t slots, std::size_t ahead) {
  ReplayOptions options;
  options.experts = experts;
  options.slab_bytes = slab_bytes;
  options.memory = Budget::experts(slots);
  options.ahead = ahead;
  // Long beside the moods of a busy machine, and no two of them end at the same time.
  options.bytes_per_second = slab_bytes / 0.0071;
  options.latency_seconds = 0.0033;
  options.layer_seconds = 0.0157;
  options.expert_seconds = 0.0023;
  return options;
}

void sleep(double seconds) { std::this_thread::sleep_for(std::chrono::duration<double>(seconds)); }

template <class Policy>
CacheStats really(const std::vector<PassNeeds>& passes, const ReplayOptions& options) {
  CpuBackend backend;
  const auto store =
      std::make_shared<ThrottledStore>(std::make_shared<PatternStore>(layers, experts, slab_bytes),
                                       options.bytes_per_second, options.latency_seconds);
  ExpertCache<CpuBackend, Policy> cache(backend, store, options.memory);
  OffloadScheduler<CpuBackend, Policy> scheduler(backend, cache,
                                                 SchedulerOptions{.transfers = options.transfers});
  std::size_t built = 0;
  if (options.ahead > 0) {
    scheduler.start(
        [&]() -> std::optional<HashTable> {
          if (built == passes.size()) return std::nullopt;
          return table_of(passes[built++]);
        },
        options.ahead);
  }
  for (const PassNeeds& needs : passes) {
    if (options.ahead > 0)
      scheduler.next_batch();
    else
      scheduler.begin_pass({}, 0, {});
    for (std::int32_t layer = 0; layer < layers; ++layer) {
      sleep(options.layer_seconds);
      auto demand = scheduler.demand(layer, needs[static_cast<std::size_t>(layer)], {}, false);
      for (;;) {
        const auto leases = demand.next_ready();
        if (leases.empty()) break;
        sleep(options.expert_seconds * static_cast<double>(leases.size()));
      }
    }
    scheduler.end_pass();
  }
  return scheduler.stats();
}

// Real time is what the machine makes of it, so the best of a few runs counts.
template <class Policy>
void check_against_a_run(std::int64_t slots, std::size_t ahead) {
  const auto passes = made_up(12, 5, 7);
  const ReplayOptions options = options_for(slots, ahead);
  const HashTable table = recorded(passes);
  const ReplayResult result = replay<Policy>(table, table, options);
  CAPTURE(Policy::name(), slots, ahead, result.stats.loads, result.stats.total.stall_seconds);
  CHECK(result.slots == slots);
  CHECK(result.stats.bytes_moved == result.stats.loads * std::int64_t{slab_bytes});
  bool agreed = false;
  for (int attempt = 0; attempt < 6 && !agreed; ++attempt) {
    const CacheStats real = really<Policy>(passes, options);
    CAPTURE(real.loads, real.total.stall_seconds);
    CHECK(result.stats.total.uses == real.total.uses);
    CHECK(result.stats.passes == real.passes);
    CHECK(result.stats.tables == real.tables);
    agreed = result.stats.bytes_moved == real.bytes_moved &&
             std::abs(result.stats.total.stall_seconds - real.total.stall_seconds) <=
                 0.1 * real.total.stall_seconds;
  }
  CHECK(agreed);
}

// Every order in which experts could be evicted.
std::int64_t fewest_loads(const std::vector<std::int32_t>& uses, std::size_t at,
                          std::vector<std::int32_t> cache, std::size_t slots) {
  if (at == uses.size()) return 0;
  if (std::find(cache.begin(), cache.end(), uses[at]) != cache.end())
    return fewest_loads(uses, at + 1, cache, slots);
  if (cache.size() < slots) {
    cache.push_back(uses[at]);
    return 1 + fewest_loads(uses, at + 1, cache, slots);
  }
  std::int64_t fewest = std::ssize(uses);
  for (std::size_t victim = 0; victim < slots; ++victim) {
    auto other = cache;
    other[victim] = uses[at];
    fewest = std::min(fewest, 1 + fewest_loads(uses, at + 1, other, slots));
  }
  return fewest;
}

}  // namespace

TEST_CASE("A replay foretells the bytes and the stall of a run", "[replay]") {
  check_against_a_run<LookAheadPolicy>(18, 16);
  check_against_a_run<LookAheadPolicy>(18, 0);
  check_against_a_run<LruPolicy>(30, 0);
  check_against_a_run<FifoPolicy>(18, 0);
}

TEST_CASE("Without a link's limits a replay never stands still", "[replay]") {
  ReplayOptions options = options_for(20, 16);
  options.bytes_per_second = std::numeric_limits<double>::infinity();
  options.latency_seconds = 0;
  const HashTable table = recorded(made_up(12, 5, 7));
  const ReplayResult result = replay<LookAheadPolicy>(table, table, options);
  CHECK(result.stats.total.stall_seconds == 0);
  CHECK(result.seconds ==
        Approx(12 * layers * options.layer_seconds +
               static_cast<double>(result.stats.total.uses) * options.expert_seconds));
}

TEST_CASE("A replay of one expert on one slot takes the times by hand", "[replay]") {
  ReplayOptions options = options_for(1, 0);
  options.bytes_per_second = slab_bytes / 0.25;
  options.latency_seconds = 0.5;
  options.layer_seconds = 1;
  options.expert_seconds = 2;
  const PassNeeds needs{{3}, {3}, {}};
  const HashTable table = recorded({needs});
  const ReplayResult result = replay<LruPolicy>(table, table, options);
  CHECK(result.stats.loads == 2);
  CHECK(result.stats.total.misses == 2);
  CHECK(result.stats.total.stall_seconds == Approx(2 * 0.75));
  CHECK(result.seconds == Approx(3 * 1 + 2 * 0.75 + 2 * 2));
}

TEST_CASE("A replay comes to its end on links of any speed", "[replay]") {
  const HashTable table = recorded(made_up(40, 5, 7));
  for (const double rate : {1e3, 1e8, 1e9, 5e9, 7.3e9, 1e12})
    for (const double seconds : {0.0, 1e-4, 1e-3, 1.0 / 3}) {
      ReplayOptions options = options_for(9, 16);
      options.bytes_per_second = rate;
      options.latency_seconds = 0;
      options.layer_seconds = seconds;
      CHECK(replay<LookAheadPolicy>(table, table, options).stats.total.uses ==
            replay<LruPolicy>(table, table, options).stats.total.uses);
    }
}

// An unsure use is expected later than its step: two such experts must not make way for one another
// for ever, where the link sets no end to it.
TEST_CASE("A replay of unsure tables comes to its end without limits of the link", "[replay]") {
  const auto passes = made_up(20, 5, 7);
  const HashTable routing = recorded(passes);
  HashTable foretold = routing;
  std::mt19937 random(3);
  for (float& probability : foretold.probs)
    if (probability > 0) probability = 0.3f + 0.1f * static_cast<float>(random() % 7);
  for (std::int64_t slots = 1; slots <= layers * experts; ++slots)
    for (const std::size_t ahead : {1u, 4u, 16u}) {
      ReplayOptions options = options_for(slots, ahead);
      options.bytes_per_second = std::numeric_limits<double>::infinity();
      options.latency_seconds = options.layer_seconds = options.expert_seconds = 0;
      CAPTURE(slots, ahead);
      const auto stats = replay<LookAheadPolicy>(routing, foretold, options).stats;
      CHECK(stats.total.hits + stats.total.late + stats.total.misses == stats.total.uses);
      CHECK(replay<LruPolicy>(routing, foretold, options).stats.total.uses == stats.total.uses);
    }
}

TEST_CASE("What padding alone needs is moved and not counted", "[replay]") {
  HashTable table = recorded({PassNeeds{{1, 2}, {3}, {4}}});
  table.probs[1] = 0;  // expert 2 of layer 0
  const ReplayResult result = replay<LruPolicy>(table, table, options_for(36, 16));
  CHECK(result.stats.loads == 4);
  CHECK(result.stats.total.uses == 3);
}

TEST_CASE("A replay of tables that do not belong together is refused", "[replay]") {
  const HashTable table = recorded(made_up(3, 2, 1)), other = recorded(made_up(2, 2, 1));
  CHECK_THROWS_AS(replay<LruPolicy>(table, other, options_for(4, 1)), InvalidArgument);
  ReplayOptions options = options_for(4, 1);
  options.experts = 2;
  CHECK_THROWS_AS(replay<LruPolicy>(table, table, options), InvalidArgument);
  options = options_for(4, 1);
  options.bytes_per_second = 0;
  CHECK_THROWS_AS(replay<LruPolicy>(table, table, options), InvalidArgument);
  options = options_for(0, 1);
  CHECK_THROWS_AS(replay<LruPolicy>(table, table, options), InvalidArgument);
}

TEST_CASE("Belady's rule gives the fewest loads of all ways to evict", "[replay]") {
  std::mt19937 random(5);
  for (int round = 0; round < 30; ++round) {
    std::vector<std::int32_t> uses;
    std::vector<PassNeeds> passes;
    for (int i = 0; i < 12; ++i) {
      uses.push_back(static_cast<std::int32_t>(random() % 5));
      passes.push_back({{uses.back()}});
    }
    for (const std::size_t slots : {1u, 2u, 3u}) {
      CAPTURE(round, slots);
      CHECK(belady_loads(uses_of(recorded(passes)), static_cast<std::int64_t>(slots)) ==
            fewest_loads(uses, 0, {}, slots));
    }
  }
}

}  // namespace replay_test
