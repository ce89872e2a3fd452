// SPDX-License-Identifier: Apache-2.0
#include <atomic>
#include <memory>
#include <optional>
#include <random>
#include <span>
#include <tuple>
#include <vector>

#include "cuda/device.hpp"
#include "sida/cache/fifo_policy.hpp"
#include "sida/cache/lfu_policy.hpp"
#include "sida/cache/look_ahead_policy.hpp"
#include "sida/cache/lru_policy.hpp"
#include "sida/cache/pinned_layers.hpp"
#include "sida/cache/pinned_store.hpp"
#include "sida/schedule/offload_scheduler.hpp"
#include "sida/schedule/slab_loader_cuda.hpp"
#include "support/catch.hpp"
#include "support/pattern_store.hpp"
#include "support/scheduled.hpp"

using namespace sida;
using namespace sida::test;

namespace cuda_scheduler_test {
namespace {

constexpr std::size_t slab_bytes = 5000;
constexpr std::int32_t layers = 3, experts = 8;
constexpr std::size_t all_bytes = layers * experts * slab_bytes;

using Policies = std::tuple<FifoPolicy, LruPolicy, LfuPolicy, LookAheadPolicy>;

// Backend, pinned store, cache and scheduler on the GPU; ends them in the right order.
template <class Policy>
struct OnGpu {
  OnGpu(std::shared_ptr<PatternStore> experts_, std::size_t host_bytes, const Budget& budget,
        const SchedulerOptions& options = {})
      : pattern(std::move(experts_)),
        store(std::make_shared<PinnedStore>(backend, pattern, host_bytes)),
        cache(backend, store, budget),
        scheduler(backend, cache, options) {}

  bool holds(ExpertId id, const std::byte* slab) {
    std::vector<std::byte> bytes(slab_bytes);
    copy_to_host(bytes.data(), slab, slab_bytes);
    return pattern->holds(id, bytes.data());
  }
  // Asks for the experts; true if each was handed out once, with its bytes.
  bool call(std::int32_t layer, const std::vector<std::int32_t>& wanted) {
    std::vector<int> seen(experts, 0), expected(experts, 0);
    for (const std::int32_t expert : wanted) expected[static_cast<std::size_t>(expert)] = 1;
    auto demand = scheduler.demand(layer, wanted, {}, false);
    for (;;) {
      const auto leases = demand.next_ready();
      if (leases.empty()) return seen == expected;
      for (const auto& lease : leases) {
        backend.synchronize(lease.arrival());
        seen[static_cast<std::size_t>(lease.id().expert)] +=
            holds(lease.id(), lease.slab()) ? 1 : 1000;
      }
    }
  }

  CudaBackend backend;
  std::shared_ptr<PatternStore> pattern;
  std::shared_ptr<PinnedStore> store;
  ExpertCache<CudaBackend, Policy> cache;
  OffloadScheduler<CudaBackend, Policy> scheduler;
};

}  // namespace

TEMPLATE_LIST_TEST_CASE("On the GPU a layer gets every expert whole, with any number of slots",
                        "[cuda][scheduler]", Policies) {
  if (!gpu_found()) return;
  const auto slots = GENERATE(1, 2, 5, 24);
  const auto host_bytes = GENERATE(as<std::size_t>(), all_bytes, all_bytes / 2, slab_bytes);
  SchedulerOptions options;
  options.transfers.chunk_bytes = 1024;  // no divisor of the slab
  OnGpu<TestType> engine(std::make_shared<PatternStore>(layers, experts, slab_bytes), host_bytes,
                         Budget::experts(slots), options);
  CHECK(engine.cache.capacity_bytes() == static_cast<std::size_t>(slots) * slab_bytes);
  CHECK(engine.store->pinned_bytes() == host_bytes);  // of experts, and of a ring in pieces of one
  std::mt19937 random(11);
  for (int pass = 0; pass < 10; ++pass) {
    const PassNeeds needs = random_needs(random, layers, experts);
    // Every other pass is foretold; of these every third wrongly.
    const PassNeeds foretold = pass % 3 == 0 ? random_needs(random, layers, experts) : needs;
    engine.scheduler.begin_pass(pass % 2 ? std::optional(table_of(foretold)) : std::nullopt, 0, {});
    for (std::int32_t layer = 0; layer < layers; ++layer)
      REQUIRE(engine.call(layer, needs[static_cast<std::size_t>(layer)]));
    engine.scheduler.end_pass();
  }
}

TEST_CASE("A read that fails on the way to the GPU reaches the caller, and the next call is right",
          "[cuda][scheduler]") {
  if (!gpu_found()) return;
  auto fails = std::make_shared<std::atomic<bool>>(true);
  OnGpu<LruPolicy> engine(std::make_shared<PatternStore>(layers, experts, slab_bytes,
                                                         [fails](ExpertId, std::size_t) {
                                                           if (*fails) throw IoError("injected");
                                                         }),
                          slab_bytes, Budget::experts(3));
  CHECK_THROWS_WITH(engine.call(0, {1, 2}), "injected");
  *fails = false;
  CHECK(engine.call(0, {1, 2, 5, 7}));
}

TEST_CASE("A budget beyond the GPU's free memory leaves the cache as it was", "[cuda][cache]") {
  if (!gpu_found()) return;
  CudaBackend backend;
  const std::size_t slab = backend.available_bytes() / 4;
  ExpertCache<CudaBackend, LruPolicy> cache(backend, std::make_shared<PatternStore>(1, 8, slab),
                                            Budget::experts(1));
  CHECK_THROWS_AS(cache.resize(Budget::experts(8)), OutOfMemory);
  CHECK(cache.slots() == 1);
  CHECK(cache.capacity_bytes() == slab);
}

TEST_CASE("Filling pinned memory passes a failing read on", "[cuda][store]") {
  if (!gpu_found()) return;
  CudaBackend backend;
  const auto store =
      std::make_shared<PatternStore>(layers, experts, slab_bytes, [](ExpertId id, std::size_t) {
        if (id == ExpertId{1, 3}) throw IoError("injected");
      });
  CHECK_THROWS_WITH(PinnedStore(backend, store, all_bytes), "injected");
  CHECK_NOTHROW(PinnedStore(backend, store, 8 * slab_bytes));  // does not reach it
  CHECK_THROWS_AS(PinnedStore(backend, store, slab_bytes - 1), InvalidArgument);
}

TEST_CASE("Without pinned memory nothing comes to the GPU", "[cuda][scheduler]") {
  if (!gpu_found()) return;
  CudaBackend backend;
  ExpertCache<CudaBackend, LruPolicy> cache(
      backend, std::make_shared<PatternStore>(layers, experts, slab_bytes), Budget::experts(2));
  OffloadScheduler<CudaBackend, LruPolicy> scheduler(backend, cache);
  auto demand = scheduler.demand(0, {1}, {}, false);
  CHECK_THROWS_AS(demand.next_ready(), InvalidArgument);
}

TEST_CASE("Layers that were taken from RAM and from the GPU lie in pinned memory and come back",
          "[cuda][store]") {
  if (!gpu_found()) return;
  CudaBackend backend;
  PatternStore pattern(2, experts, slab_bytes);
  PinnedLayers pinned(backend, 2, experts, slab_bytes);
  std::vector<std::vector<std::byte>> slabs(2 * experts, std::vector<std::byte>(slab_bytes));
  std::vector<DeviceBuffer> there(experts);
  std::vector<std::vector<ArrayPart>> parts(2 * experts);
  for (std::size_t i = 0; i < slabs.size(); ++i) {
    const ExpertId id{static_cast<std::int32_t>(i) / experts,
                      static_cast<std::int32_t>(i) % experts};
    pattern.read(id, 0, slabs[i]);
    const std::byte* data = slabs[i].data();
    if (id.layer == 1) {
      there[static_cast<std::size_t>(id.expert)].fill(slabs[i]);
      data = there[static_cast<std::size_t>(id.expert)].data();
    }
    parts[i] = {{0, data, 1000}, {1000, data + 1000, slab_bytes - 1000}};
  }
  const std::span all(parts);
  pinned.take(all.first(experts));
  for (auto& slab : slabs) slab.assign(slab_bytes, std::byte{0});  // let go
  pinned.take(all.last(experts));
  CHECK_THROWS_AS(pinned.take(all.last(experts)), InvalidArgument);
  for (std::int32_t layer = 0; layer < 2; ++layer)
    for (std::int32_t e = 0; e < experts; ++e)
      CHECK(pattern.holds({layer, e}, pinned.pinned({layer, e})));

  check_cuda(cudaMemset(there[3].data(), 0xff, slab_bytes));
  wait_for_default_stream();
  pinned.give_back(0, all.first(experts));
  pinned.give_back(1, all.last(experts));
  for (std::int32_t e = 0; e < experts; ++e)
    CHECK(pattern.holds({0, e}, slabs[static_cast<std::size_t>(e)].data()));
  copy_to_host(slabs[3].data(), there[3].data(), slab_bytes);
  CHECK(pattern.holds({1, 3}, slabs[3].data()));
}

}  // namespace cuda_scheduler_test
