// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "sida/cache/use_forecast.hpp"
#include "sida/hash/hash_table.hpp"
#include "sida/schedule/offload_plan.hpp"
#include "sida/schedule/prefetch_queue.hpp"

namespace sida {

/// At which steps passes take place, and what is foretold for them.
///
/// The pass of the n-th table that was announced begins at step n · layers. A pass without a table,
/// or with one while others wait, takes the steps of the pass that began last once more. All state
/// is guarded by the cache's mutex, which every member expects to be held.
template <class Cache>
class PassSteps {
 public:
  PassSteps(Cache& cache, PrefetchQueue<Cache>& prefetches)
      : cache_(cache), prefetches_(prefetches), layers_(cache.store().layers()) {}

  /// What the tables of a pass foretell, with steps from 0. Uses that are not probable enough to
  /// bring an expert early may be to keep one that is there.
  OffloadPlan plan_of(const HashTable& table) const {
    constexpr double least = 0.05;  // less says nothing, and costs time at every eviction
    return plan_uses(table, cache_.store().experts(), 0, std::min(least, prefetches_.threshold()));
  }

  /// First step of the pass at hand.
  std::int64_t first() const noexcept { return first_; }

  /// A table was built ahead. `plan` has steps from 0. Returns the first step of its pass.
  std::int64_t announce(OffloadPlan plan) {
    announced_ += layers_;
    add(std::move(plan), announced_);
    return announced_;
  }

  /// Begins the pass of a table that was announced with this step.
  void begin_announced(std::int64_t first_step) {
    begun_ = first_step;
    begin();
  }

  /// Begins a pass that was not announced, with the plan of its own table, or an empty one.
  void begin_unannounced(OffloadPlan plan, bool has_table) {
    // It takes the steps of the pass before, which is over, unless no table waits.
    if (has_table && announced_ == begun_) announced_ = begun_ += layers_;
    begin();
    add(std::move(plan), begun_);
  }

  /// The pass at hand is over.
  void end() {
    cache_.forecast().advance(first_ + layers_);
    prefetches_.drop_before(first_ + layers_);
  }

  /// Forgets the passes that were announced and have not begun.
  void forget_announced() {
    announced_ = begun_;
    cache_.forecast().forget_from(begun_ + layers_);
    prefetches_.drop_from(begun_ + layers_);
  }

 private:
  void begin() {
    first_ = begun_;
    cache_.forecast().begin_pass(first_);
  }
  void add(OffloadPlan plan, std::int64_t first_step) {
    for (PlannedUse& use : plan) {
      use.step += first_step;
      cache_.forecast().add(use.id, use.step, use.probability);
    }
    prefetches_.add(std::move(plan));
  }

  Cache& cache_;
  PrefetchQueue<Cache>& prefetches_;
  std::int64_t layers_;
  std::int64_t first_ = 0;
  std::int64_t announced_ = 0;  // first step of the table announced last
  std::int64_t begun_ = 0;      // first step of the table whose pass began last
};

}  // namespace sida
