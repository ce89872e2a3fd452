// SPDX-License-Identifier: Apache-2.0
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "support/catch.hpp"
#include "support/copied_store.hpp"
#include "support/delays.hpp"
#include "support/layers.hpp"

using namespace sida;
using namespace sida::test;

namespace {

std::uint32_t setting(const char* name, std::uint32_t otherwise) {
  const char* const text = std::getenv(name);
  return text ? static_cast<std::uint32_t>(std::stoul(text)) : otherwise;
}

/// One schedule: batches whose tables are built ahead, right and wrong ones, in between passes
/// without a table, look-ahead, another thread that looks on, and budgets that change.
void run_schedule(std::uint32_t seed, const Model& model, const std::vector<std::byte>& expected,
                  const std::vector<HashTable>& tables) {
  Delays::begin(seed);
  std::mt19937 random(seed);
  SchedulerOptions options;
  options.transfers.threads = 1 + static_cast<int>(random() % 3);
  options.transfers.chunk_bytes = random() % 2 ? 1000 : std::size_t{1} << 20;
  Layers<DelayedBackend, DelayedPolicy> engine(
      model, Budget::experts(1 + static_cast<std::int64_t>(random() % 18)),
      std::make_shared<CopiedStore>(model.store), options);
  auto& scheduler = *engine.scheduler;
  if (random() % 2) engine.look_ahead = static_cast<std::int32_t>(random() % 3);

  constexpr int batches = 4;
  scheduler.start(
      [&, built = 0]() mutable -> std::optional<HashTable> {
        Delays::here();  // before the table is pushed
        if (built == batches) return std::nullopt;
        return tables[(seed + static_cast<std::uint32_t>(built++)) % tables.size()];
      },
      1 + random() % 4);
  std::jthread onlooker([&] {
    for (int i = 0; i < 20; ++i) {
      Delays::here();
      const auto total = scheduler.stats().total;
      if (total.hits + total.late + total.misses > total.uses) std::abort();
      engine.cache.resident();
    }
  });
  for (int batch = 0; batch < batches; ++batch) {
    Delays::here();  // before a table is popped
    REQUIRE(scheduler.next_batch());
    Delays::here();
    REQUIRE(engine.rest_of_pass() == expected);
    if (random() % 4 == 0) REQUIRE(engine.pass() == expected);
    if (random() % 4 == 0)
      scheduler.resize(Budget::experts(1 + static_cast<std::int64_t>(random() % 18)));
  }
  CHECK_FALSE(scheduler.next_batch());
  onlooker.join();
  const auto stats = scheduler.stats();
  REQUIRE(stats.total.hits + stats.total.late + stats.total.misses == stats.total.uses);
  REQUIRE(stats.failed_prefetches == 0);
  if (seed % 2) scheduler.close();
}

}  // namespace

TEST_CASE("No schedule of the threads changes a bit", "[layer][schedules]") {
  const Model model;
  Default whole(model, Budget::fraction(1));
  const auto expected = whole.pass();
  std::vector<HashTable> tables{whole.scheduler->recorder().table()};
  for (const int shift : {1, 3}) {  // foretelling other experts than the router chooses
    tables.push_back(tables[0]);
    for (std::int32_t& id : tables.back().ids) id = (id + shift) % model.config.experts;
  }
  const std::uint32_t first = setting("SIDA_FIRST_SEED", 1);
  const std::uint32_t schedules = setting("SIDA_SCHEDULES", 200);
  for (std::uint32_t seed = first; seed < first + schedules; ++seed) {
    INFO("SIDA_FIRST_SEED=" << seed << " SIDA_SCHEDULES=1 begins here");
    run_schedule(seed, model, expected, tables);
  }
}
