// SPDX-License-Identifier: Apache-2.0
#include "sida/schedule/prefetch_queue.hpp"

#include <memory>
#include <mutex>
#include <utility>

#include "sida/backend/cpu_backend.hpp"
#include "sida/cache/look_ahead_policy.hpp"
#include "support/catch.hpp"
#include "support/pattern_store.hpp"

using namespace sida;
using namespace sida::test;

namespace {

using Cache = ExpertCache<CpuBackend, LookAheadPolicy>;
constexpr std::int64_t reach = 4;

// Brings what the queue asks for; how many experts that was.
int bring_all(Cache& cache, PrefetchQueue<Cache>& queue) {
  int brought = 0;
  for (auto slot = queue.reserve_next(reach); slot; slot = queue.reserve_next(reach), ++brought)
    cache.commit_locked(std::move(*slot), LoadedFor::table);
  return brought;
}

}  // namespace

TEST_CASE("A queue of prefetches has work as long as a foretold expert may be absent",
          "[prefetch_queue]") {
  CpuBackend backend;
  Cache cache(backend, std::make_shared<PatternStore>(2, 4, 256), Budget::experts(3));
  PrefetchQueue<Cache> queue(cache, 0.4);
  const std::lock_guard lock(cache.mutex());
  CHECK_FALSE(queue.has_work());

  const OffloadPlan plan{{0, {0, 1}, 1}, {1, {1, 2}, 1}, {1, {1, 3}, 1}};
  for (const PlannedUse& use : plan) cache.forecast().add(use.id, use.step, use.probability);
  queue.add(plan);
  CHECK(queue.has_work());
  CHECK(bring_all(cache, queue) == 3);
  CHECK_FALSE(queue.has_work());  // all are there: nobody need be woken

  SECTION("more is foretold") {
    cache.forecast().add({0, 0}, 2);
    queue.add({{2, {0, 0}, 1}});
    CHECK(queue.has_work());
  }
  SECTION("one of them had to make way") {
    auto slot = cache.reserve_locked({0, 0}, [](ExpertId id) { return id == ExpertId{1, 3}; });
    REQUIRE(slot);
    CHECK(queue.has_work());
    cache.give_up_locked(std::move(*slot));
    CHECK(bring_all(cache, queue) == 1);
    CHECK(cache.residency_locked({1, 3}) == Cache::Residency::resident);
    CHECK_FALSE(queue.has_work());
  }
  SECTION("a load failed") {
    queue.begin_anew();
    CHECK(queue.has_work());
  }
  SECTION("all of them are past") {
    queue.drop_before(2);
    CHECK_FALSE(queue.has_work());
  }
}
