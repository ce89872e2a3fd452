// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <span>
#include <utility>
#include <vector>

#include "sida/hash/hash_table.hpp"
#include "sida/schedule/offload_scheduler.hpp"
#include "support/backends.hpp"
#include "support/pattern_store.hpp"

namespace sida::test {

/// The experts that each layer of a pass needs.
using PassNeeds = std::vector<std::vector<std::int32_t>>;

/// In each layer about half of the experts.
inline PassNeeds random_needs(std::mt19937& random, std::int32_t layers, std::int32_t experts) {
  PassNeeds needs(static_cast<std::size_t>(layers));
  for (auto& layer : needs)
    for (std::int32_t e = 0; e < experts; ++e)
      if (random() % 2) layer.push_back(e);
  return needs;
}

/// The table that foretells exactly these needs, each with probability `probability`.
inline HashTable table_of(const PassNeeds& needs, std::uint64_t key = 0, float probability = 1) {
  std::size_t width = 1;
  for (const auto& layer : needs) width = std::max(width, layer.size());
  HashTable table;
  table.layers = static_cast<std::int32_t>(needs.size());
  table.candidates = 1;
  table.keys = {key};
  table.offsets = {0, static_cast<std::int64_t>(width)};
  table.ids.assign(needs.size() * width, -1);
  table.probs.assign(table.ids.size(), 0);
  table.scale.assign(table.ids.size(), 1);
  for (std::size_t layer = 0; layer < needs.size(); ++layer) {
    for (std::size_t i = 0; i < needs[layer].size(); ++i) {
      table.ids[layer * width + i] = needs[layer][i];
      table.probs[layer * width + i] = probability;
    }
  }
  return table;
}

/// Backend, cache and scheduler over a store; ends them in the right order.
template <class B, class P>
struct Scheduled {
  using Scheduler = OffloadScheduler<B, P>;

  Scheduled(std::shared_ptr<PatternStore> experts, const Budget& budget,
            const SchedulerOptions& options = {})
      : store(std::move(experts)),
        cache(backend, store, budget),
        scheduler(backend, cache, options) {}

  /// Asks for the experts and checks the bytes of each. Returns how often each was handed out.
  std::vector<int> call(std::int32_t layer, const std::vector<std::int32_t>& experts,
                        std::span<const std::uint8_t> counted = {}) {
    std::vector<int> seen(static_cast<std::size_t>(store->experts()), 0);
    auto demand = scheduler.demand(layer, experts, counted, false);
    for (;;) {
      const auto leases = demand.next_ready();
      if (leases.empty()) return seen;
      for (const auto& lease : leases) {
        const bool right = lease.id().layer == layer && store->holds(lease.id(), lease.slab());
        seen[static_cast<std::size_t>(lease.id().expert)] += right ? 1 : 1000;
      }
    }
  }
  bool is_resident(ExpertId id) const {
    const auto ids = cache.resident();
    return std::find(ids.begin(), ids.end(), id) != ids.end();
  }

  B backend;
  std::shared_ptr<PatternStore> store;
  ExpertCache<B, P> cache;
  Scheduler scheduler;
};

/// What call() returns for experts that were each handed out once, of `total`.
inline std::vector<int> once(const std::vector<std::int32_t>& experts, std::size_t total) {
  std::vector<int> seen(total, 0);
  for (const std::int32_t expert : experts) seen[static_cast<std::size_t>(expert)] = 1;
  return seen;
}

}  // namespace sida::test
