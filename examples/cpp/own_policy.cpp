// SPDX-License-Identifier: Apache-2.0
//
// An eviction policy of one's own: the expert used last goes first. On a walk through the layers
// that is longer than the cache it beats LRU, which always throws out what comes next.

#include <cstdio>
#include <memory>
#include <span>
#include <unordered_map>
#include <vector>

#include "sida/sida.hpp"

class MostRecentPolicy {
 public:
  static constexpr std::string_view name() { return "most recent"; }

  void inserted(sida::ExpertId id) { last_use_[id] = ++clock_; }
  void used(sida::ExpertId id) { last_use_[id] = ++clock_; }
  void evicted(sida::ExpertId id) { last_use_.erase(id); }

  std::size_t victim(std::span<const sida::ExpertId> candidates, const sida::UseForecast&) const {
    std::size_t latest = 0;
    for (std::size_t i = 1; i < candidates.size(); ++i)
      if (last_use_.at(candidates[i]) > last_use_.at(candidates[latest])) latest = i;
    return latest;
  }

 private:
  std::unordered_map<sida::ExpertId, int> last_use_;
  int clock_ = 0;
};
static_assert(sida::EvictionPolicy<MostRecentPolicy>);

// How many of `passes` walks through 4 layers of 8 experts find their expert in half the memory.
template <class Policy>
void replay(int passes) {
  constexpr int layers = 4, experts = 8;
  constexpr std::size_t slab_bytes = 1024;
  std::vector<std::byte> weights(layers * experts * slab_bytes);
  std::vector<std::vector<sida::ArrayPart>> parts;
  for (std::size_t i = 0; i < layers * experts; ++i)
    parts.push_back({{0, weights.data() + i * slab_bytes, slab_bytes}});
  sida::CpuBackend backend;
  sida::ExpertCache<sida::CpuBackend, Policy> cache(
      backend, std::make_shared<sida::ArrayStore>(layers, experts, slab_bytes, parts),
      sida::Budget::fraction(0.5));
  sida::OffloadScheduler<sida::CpuBackend, Policy> scheduler(backend, cache);
  for (int pass = 0; pass < passes; ++pass) {
    scheduler.begin_pass({}, 0, {});
    for (int layer = 0; layer < layers; ++layer) {
      auto demand = scheduler.demand(layer, {0, 1, 2, 3, 4, 5}, {}, false);
      while (!demand.next_ready().empty()) continue;  // here the experts would be computed
    }
    scheduler.end_pass();
  }
  const sida::LayerStats total = scheduler.stats().total;
  std::printf("%-12s %4lld hits of %lld uses\n", Policy::name().data(),
              static_cast<long long>(total.hits), static_cast<long long>(total.uses));
}

int main() {
  replay<sida::LruPolicy>(20);
  replay<MostRecentPolicy>(20);
}
