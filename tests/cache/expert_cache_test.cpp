// SPDX-License-Identifier: Apache-2.0
#include "sida/cache/expert_cache.hpp"

#include <unistd.h>

#include <atomic>
#include <cstring>
#include <fstream>
#include <memory>
#include <optional>
#include <random>
#include <thread>
#include <vector>

#include "support/backends.hpp"
#include "support/catch.hpp"
#include "support/pattern_store.hpp"

using namespace sida;
using namespace sida::test;

namespace {

constexpr std::size_t slab_bytes = 256;

std::shared_ptr<PatternStore> small_store() {
  return std::make_shared<PatternStore>(2, 4, slab_bytes);
}

template <class Cache>
std::optional<typename Cache::Lease> bring(Cache& cache, ExpertId id) {
  auto loading = cache.reserve(id);
  if (!loading) return std::nullopt;
  cache.store().read(id, 0, {loading->slab(), slab_bytes});
  return cache.commit(std::move(*loading));
}

// Whole slabs in one block, for use in place.
std::shared_ptr<ArrayStore> array_store() {
  auto block = std::make_shared<std::vector<std::byte>>(8 * slab_bytes);
  std::vector<std::vector<ArrayPart>> parts;
  for (std::size_t i = 0; i < 8; ++i)
    parts.push_back({{0, block->data() + i * slab_bytes, slab_bytes}});
  return std::make_shared<ArrayStore>(2, 4, slab_bytes, parts, block);
}

}  // namespace

TEMPLATE_LIST_TEST_CASE("An expert can be leased once it is resident", "[cache]", Engines) {
  typename TestType::backend backend;
  const auto store = small_store();
  ExpertCache<typename TestType::backend, typename TestType::policy> cache(backend, store,
                                                                           Budget::experts(2));
  CHECK(cache.slots() == 2);
  CHECK(cache.capacity_bytes() == 2 * slab_bytes);
  CHECK_FALSE(cache.try_lease({1, 2}));

  auto loading = cache.reserve({1, 2});
  REQUIRE(loading);
  CHECK(loading->id() == ExpertId{1, 2});
  CHECK_FALSE(cache.try_lease({1, 2}));  // not there yet
  CHECK_FALSE(cache.reserve({1, 2}));    // and not to be loaded twice
  store->read({1, 2}, 0, {loading->slab(), slab_bytes});
  { const auto lease = cache.commit(std::move(*loading)); }
  const auto lease = cache.try_lease({1, 2});
  REQUIRE(lease);
  CHECK(store->holds({1, 2}, lease->slab()));
  CHECK(cache.resident() == std::vector<ExpertId>{{1, 2}});
}

TEMPLATE_LIST_TEST_CASE("Neither leased nor loading experts are ever evicted", "[cache]", Engines) {
  typename TestType::backend backend;
  const auto store = small_store();
  ExpertCache<typename TestType::backend, typename TestType::policy> cache(backend, store,
                                                                           Budget::experts(2));
  auto first = bring(cache, {0, 0});
  const auto second = cache.reserve({0, 1});
  REQUIRE(first);
  REQUIRE(second);
  CHECK_FALSE(cache.reserve({0, 2}));  // one leased, one loading
  first.reset();
  const auto third = bring(cache, {0, 2});
  REQUIRE(third);
  CHECK_FALSE(cache.try_lease({0, 0}));
  CHECK(store->holds({0, 2}, third->slab()));
}

TEMPLATE_LIST_TEST_CASE("An expert that is leased twice stays until both leases end", "[cache]",
                        Engines) {
  typename TestType::backend backend;
  ExpertCache<typename TestType::backend, typename TestType::policy> cache(backend, small_store(),
                                                                           Budget::experts(1));
  auto one = bring(cache, {0, 0});
  auto two = cache.try_lease({0, 0});
  one.reset();
  CHECK_FALSE(cache.reserve({0, 1}));
  two.reset();
  CHECK(cache.reserve({0, 1}));
}

TEMPLATE_LIST_TEST_CASE("A load that is given up leaves its slot free", "[cache]", Engines) {
  typename TestType::backend backend;
  ExpertCache<typename TestType::backend, typename TestType::policy> cache(backend, small_store(),
                                                                           Budget::experts(1));
  { const auto loading = cache.reserve({0, 0}); }
  CHECK(cache.resident().empty());
  CHECK(bring(cache, {0, 3}));
}

TEMPLATE_LIST_TEST_CASE("Ids outside the model never reach memory", "[cache]", Engines) {
  typename TestType::backend backend;
  ExpertCache<typename TestType::backend, typename TestType::policy> cache(backend, small_store(),
                                                                           Budget::experts(1));
  for (const ExpertId id : {ExpertId{2, 0}, {0, 4}, {-1, 0}, {0, -1}}) {
    CHECK_THROWS_AS(cache.try_lease(id), OutOfRange);
    CHECK_THROWS_AS(cache.reserve(id), OutOfRange);
  }
}

TEST_CASE("A slot is given away before its readers are done, and its load told what to wait for",
          "[cache]") {
  LateBackend backend;
  ExpertCache<LateBackend, LruPolicy> cache(backend, small_store(), Budget::experts(1));
  auto copies = backend.make_stream(), kernels = backend.make_stream();
  auto loading = cache.reserve({0, 0});
  CHECK(backend.passed(loading->readers()));  // nobody had the slot
  auto lease = cache.commit(std::move(*loading), backend.fence(copies));
  CHECK_FALSE(backend.passed(lease.arrival()));
  auto other = cache.try_lease({0, 0});
  CHECK_FALSE(backend.passed(other->arrival()));
  lease.end_after(backend.fence(kernels));
  CHECK_FALSE(cache.reserve({0, 1}));  // the other lease has not ended
  other.reset();

  loading = cache.reserve({0, 1});
  REQUIRE(loading);
  backend.finish(copies);
  CHECK_FALSE(backend.passed(loading->readers()));  // for the kernels
  loading.reset();                                  // given up: they read still
  loading = cache.reserve({1, 0});
  CHECK_FALSE(backend.passed(loading->readers()));
  backend.finish(kernels);
  CHECK(backend.passed(loading->readers()));
  const auto next = cache.commit(std::move(*loading));
  CHECK(backend.passed(next.arrival()));
}

TEST_CASE("An expert that is evicted unread may still be on its way", "[cache]") {
  LateBackend backend;
  ExpertCache<LateBackend, LruPolicy> cache(backend, small_store(), Budget::experts(1));
  auto copies = backend.make_stream();
  { cache.commit(std::move(*cache.reserve({0, 0})), backend.fence(copies)); }
  auto loading = cache.reserve({0, 1});
  CHECK_FALSE(backend.passed(loading->readers()));
  loading.reset();
  backend.finish(copies);  // which the cache's end would wait for
}

TEST_CASE("A resize, and the cache's end, wait for what reads the slots", "[cache]") {
  LateBackend backend;
  auto kernels = backend.make_stream();
  const auto waits_for_readers = [&](auto&& act) {
    std::atomic<bool> over = false;
    std::thread thread([&] {
      act();
      over = true;
    });
    const bool waited = eventually([&] { return over || backend.is_waited_for(); }) && !over;
    backend.finish(kernels);
    thread.join();
    return waited;
  };
  auto cache = std::make_unique<ExpertCache<LateBackend, LruPolicy>>(backend, small_store(),
                                                                     Budget::experts(2));
  bring(*cache, {0, 0})->end_after(backend.fence(kernels));
  CHECK(waits_for_readers([&] { cache->resize(Budget::experts(3)); }));
  CHECK(cache->slots() == 3);
  bring(*cache, {0, 0})->end_after(backend.fence(kernels));
  CHECK(waits_for_readers([&] { cache.reset(); }));
}

TEST_CASE("The arena is all that is ever allocated", "[cache]") {
  CountingBackend backend;
  {
    ExpertCache<CountingBackend, LruPolicy> cache(backend, small_store(),
                                                  Budget::bytes(3 * slab_bytes + 1));
    CHECK(backend.allocated() == 3 * slab_bytes);
    for (std::int32_t i = 0; i < 8; ++i) bring(cache, {i / 4, i % 4});
    CHECK(backend.peak() == 3 * slab_bytes);
    cache.resize(Budget::experts(5));  // never both arenas at once
    CHECK(backend.peak() == 5 * slab_bytes);
    CHECK(cache.resident().empty());
    CHECK(bring(cache, {1, 1}));
  }
  CHECK(backend.allocated() == 0);
}

TEST_CASE("A budget that the machine cannot give is refused with both figures", "[cache]") {
  CountingBackend backend;
  backend.available = 3 * slab_bytes;
  using Cache = ExpertCache<CountingBackend, LruPolicy>;
  CHECK_THROWS_AS(Cache(backend, small_store(), Budget::fraction(1)), OutOfMemory);
  CHECK_THROWS_WITH(
      Cache(backend, small_store(), Budget::experts(4)),
      Catch::Matchers::ContainsSubstring("1024") && Catch::Matchers::ContainsSubstring("768"));
  Cache cache(backend, small_store(), Budget::experts(3));
  backend.available = 0;  // all of it is the arena's
  REQUIRE(bring(cache, {1, 1}));
  CHECK_THROWS_AS(cache.resize(Budget::experts(4)), OutOfMemory);
  CHECK_THROWS_AS(cache.resize(Budget::bytes(1)), InvalidArgument);
  CHECK(cache.slots() == 3);  // the old budget stands, and the experts stay
  CHECK(cache.resident() == std::vector<ExpertId>{{1, 1}});
  CHECK(bring(cache, {0, 0}));
}

TEST_CASE("Arrays are used in place when all experts fit", "[cache]") {
  CountingBackend backend;
  const auto store = array_store();
  ExpertCache<CountingBackend, LruPolicy> cache(backend, store, Budget::fraction(1));
  CHECK(cache.in_place());
  CHECK(backend.allocated() == 0);
  CHECK(cache.resident().size() == 8);
  REQUIRE(cache.try_lease({1, 3}));
  CHECK(cache.try_lease({1, 3})->slab() == nullptr);

  cache.resize(Budget::experts(7));
  CHECK_FALSE(cache.in_place());
  CHECK(backend.allocated() == 7 * slab_bytes);
  CHECK(cache.resident().empty());
  cache.resize(Budget::fraction(1));
  CHECK(cache.in_place());
  CHECK(backend.allocated() == 0);
}

TEST_CASE("The policy chooses from among what may make way", "[cache]") {
  CpuBackend backend;
  ExpertCache<CpuBackend, FifoPolicy> cache(backend, small_store(), Budget::experts(3));
  for (const std::int32_t expert : {0, 1, 2}) bring(cache, {0, expert});
  std::unique_lock lock(cache.mutex());
  const auto any = [](ExpertId) { return true; };
  CHECK_FALSE(cache.reserve_locked({1, 0}, [](ExpertId) { return false; }));
  CHECK_FALSE(cache.reserve_locked({1, 0}, any, [](ExpertId id) { return id.expert != 0; }));
  const auto loading = cache.reserve_locked({1, 0}, [](ExpertId id) { return id.expert != 0; });
  lock.unlock();
  REQUIRE(loading);
  CHECK(loading->evicted() == ExpertId{0, 1});
  CHECK(cache.try_lease({0, 0}));
}

TEST_CASE("A policy that chooses what is not there is found out", "[cache]") {
  struct Wrong {
    static constexpr std::string_view name() { return "wrong"; }
    void inserted(ExpertId) {}
    void used(ExpertId) {}
    void evicted(ExpertId) {}
    std::size_t victim(std::span<const ExpertId> candidates, const UseForecast&) const {
      return candidates.size();
    }
  };
  CpuBackend backend;
  ExpertCache<CpuBackend, Wrong> cache(backend, small_store(), Budget::experts(1));
  bring(cache, {0, 0});
  CHECK_THROWS_WITH(cache.reserve({0, 1}), Catch::Matchers::ContainsSubstring("'wrong'"));
  CHECK(cache.resident() == std::vector<ExpertId>{{0, 0}});
}

TEMPLATE_LIST_TEST_CASE("Threads that lease and load at random see the right bytes", "[cache]",
                        Engines) {
  typename TestType::backend backend;
  const auto store = small_store();
  ExpertCache<typename TestType::backend, typename TestType::policy> cache(backend, store,
                                                                           Budget::experts(3));
  std::atomic<int> wrong = 0, leased = 0;
  const auto work = [&](std::uint32_t seed) {
    std::mt19937 random(seed);
    for (int i = 0; i < 2000; ++i) {
      const ExpertId id{static_cast<std::int32_t>(random() % 2),
                        static_cast<std::int32_t>(random() % 4)};
      auto lease = cache.try_lease(id);
      if (!lease) lease = bring(cache, id);
      if (!lease) continue;
      ++leased;
      wrong += lease->id() != id || !store->holds(id, lease->slab());
    }
  };
  std::thread other(work, 1), third(work, 2);
  work(3);
  other.join();
  third.join();
  CHECK(wrong == 0);
  CHECK(leased > 100);
  CHECK(cache.resident().size() <= 3);
}

TEST_CASE("Slots take memory only as they are filled, and give it back", "[cache]") {
  const auto resident_bytes = [] {
    std::size_t pages = 0, resident = 0;
    std::ifstream("/proc/self/statm") >> pages >> resident;
    return resident * static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  };
  constexpr std::size_t mebibyte = 1 << 20;
  const std::size_t before = resident_bytes();
  {
    CpuBackend backend;
    ExpertCache<CpuBackend, LruPolicy> cache(
        backend, std::make_shared<PatternStore>(1, 64, 4 * mebibyte), Budget::fraction(1));
    auto loading = cache.reserve({0, 0});
    std::memset(loading->slab(), 1, 4 * mebibyte);
    const auto lease = cache.commit(std::move(*loading));
    CHECK(resident_bytes() >= before + 4 * mebibyte);
    CHECK(resident_bytes() < before + 100 * mebibyte);  // of 256
    for (std::int32_t e = 1; e < 32; ++e) {
      auto next = cache.reserve({0, e});
      std::memset(next->slab(), 1, 4 * mebibyte);
      cache.commit(std::move(*next));
    }
    CHECK(resident_bytes() > before + 120 * mebibyte);
  }
  CHECK(resident_bytes() < before + 100 * mebibyte);
}
