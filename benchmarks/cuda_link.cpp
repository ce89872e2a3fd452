// SPDX-License-Identifier: Apache-2.0
// Rates of the link to the GPU, as JSON: copies from pinned memory by chunk size, experts through
// the scheduler, and how long a demand waits behind queued prefetches.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <memory>
#include <vector>

#include "sida/cuda.hpp"
#include "sida/sida.hpp"

using namespace sida;

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}
double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

/// Experts of zeros: what is in them does not matter to the link.
class ZeroStore : public ExpertStore {
 public:
  ZeroStore(std::int32_t layers, std::int32_t experts, std::size_t slab_bytes)
      : layers_(layers), experts_(experts), slab_bytes_(slab_bytes) {}
  std::int32_t layers() const noexcept override { return layers_; }
  std::int32_t experts() const noexcept override { return experts_; }
  std::size_t slab_bytes() const noexcept override { return slab_bytes_; }
  void read(ExpertId, std::size_t, std::span<std::byte>) override {}

 private:
  std::int32_t layers_, experts_;
  std::size_t slab_bytes_;
};

// GB/s of back-to-back copies of `chunk` bytes, 1 GiB a time.
double copy_rate(CudaBackend& backend, const PinnedBuffer& from, std::byte* to, std::size_t chunk) {
  auto stream = backend.make_stream();
  auto done = backend.make_event();
  std::vector<double> rates;
  for (int turn = 0; turn < 9; ++turn) {
    const auto begin = Clock::now();
    for (std::size_t at = 0; at + chunk <= from.size(); at += chunk)
      backend.copy_async(to + at, from.data() + at, chunk, stream);
    backend.record(done, stream);
    backend.synchronize(done);
    rates.push_back(static_cast<double>(from.size()) / seconds_since(begin) / 1e9);
  }
  return median(rates);
}

HashTable table_for_all(std::int32_t layers, std::int32_t experts) {
  HashTable table;
  table.layers = layers;
  table.candidates = 1;
  table.keys = {0};
  table.offsets = {0, experts};
  for (std::int32_t layer = 0; layer < layers; ++layer)
    for (std::int32_t e = 0; e < experts; ++e) table.ids.push_back(e);
  table.probs.assign(table.ids.size(), 1);
  table.scale.assign(table.ids.size(), 1);
  return table;
}

struct Engine {
  Engine(CudaBackend& used, std::size_t slab, std::size_t chunk, int threads)
      : backend(used),
        cache(backend,
              std::make_shared<PinnedStore>(backend, std::make_shared<ZeroStore>(2, 64, slab),
                                            128 * slab, FillReport{}, 16),
              Budget::experts(80)),
        scheduler(backend, cache, options(chunk, threads)) {}
  static SchedulerOptions options(std::size_t chunk, int threads) {
    SchedulerOptions result;
    result.transfers.chunk_bytes = chunk;
    result.transfers.threads = threads;
    return result;
  }
  // Seconds until the layer has all that it asks for.
  double demand(std::int32_t layer, const std::vector<std::int32_t>& experts) {
    const auto begin = Clock::now();
    auto demand = scheduler.demand(layer, experts, {}, false);
    for (auto leases = demand.next_ready(); !leases.empty(); leases = demand.next_ready())
      for (const auto& lease : leases) backend.synchronize(lease.arrival());
    return seconds_since(begin);
  }
  CudaBackend& backend;
  ExpertCache<CudaBackend, LruPolicy> cache;
  OffloadScheduler<CudaBackend, LruPolicy> scheduler;
};

}  // namespace

int main() {
  CudaBackend backend;
  const std::size_t gib = std::size_t{1} << 30, slab = 9u << 20;
  const auto begin = Clock::now();
  const PinnedBuffer from(backend, gib, 16);
  std::printf("{\"pin_seconds_a_gib\": %.3f,\n \"copies\": [", seconds_since(begin));
  Buffer<CudaBackend> to(backend, gib);
  const char* comma = "";
  for (std::size_t chunk = 64u << 10; chunk <= (64u << 20); chunk *= 2) {
    std::printf("%s\n  {\"chunk_bytes\": %zu, \"gb_a_second\": %.2f}", comma, chunk,
                copy_rate(backend, from, to.data(), chunk));
    comma = ",";
  }
  std::printf("],\n \"scheduler\": [");
  std::vector<std::int32_t> all(64);
  for (std::int32_t e = 0; e < 64; ++e) all[static_cast<std::size_t>(e)] = e;
  comma = "";
  for (const int threads : {1, 2, 3}) {
    for (const std::size_t chunk : {1u << 20, 2u << 20, 4u << 20, 8u << 20, 16u << 20}) {
      Engine engine(backend, slab, chunk, threads);
      std::vector<double> rates, alone, behind;
      for (int turn = 0; turn < 10; ++turn) {
        engine.cache.resize(Budget::experts(80));
        engine.scheduler.begin_pass({}, 0, {});
        rates.push_back(64.0 * static_cast<double>(slab) / engine.demand(0, all) / 1e9);
        alone.push_back(engine.demand(1, {turn}) * 1e6);
        engine.scheduler.end_pass();
        engine.cache.resize(Budget::experts(80));
        // 64 of the other layer are queued; this layer asks for one that nobody foretold.
        HashTable table = table_for_all(2, 64);
        std::fill(table.ids.begin(), table.ids.begin() + 64, -1);
        engine.scheduler.begin_pass(std::move(table), 0, {});
        while (engine.scheduler.stats().loads == 0) {
        }
        const auto until = Clock::now() + std::chrono::microseconds(700 + 37 * turn);
        while (Clock::now() < until) {
        }
        behind.push_back(engine.demand(0, {turn}) * 1e6);
        engine.scheduler.end_pass();
      }
      std::printf(
          "%s\n  {\"threads\": %d, \"chunk_bytes\": %zu, \"gb_a_second\": %.2f, "
          "\"demand_alone_us\": %.1f, \"demand_behind_prefetches_us\": %.1f, "
          "\"worst_us\": %.1f}",
          comma, threads, chunk, median(rates), median(alone), median(behind),
          *std::max_element(behind.begin(), behind.end()));
      comma = ",";
    }
  }
  std::printf("]}\n");
}
