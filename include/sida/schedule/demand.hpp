// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sida/cache/expert_cache.hpp"
#include "sida/core/error.hpp"
#include "sida/schedule/trace.hpp"
#include "sida/schedule/transfers.hpp"

namespace sida {

/// The experts that one layer call needs, handed out as they are resident: those that are there at
/// once, the others while these compute. With fewer slots than experts this goes in waves.
///
/// Used on one thread. Ending it at any point drops what was not handed out.
template <Backend B, EvictionPolicy Policy>
class Demand {
 public:
  using Cache = ExpertCache<B, Policy>;
  using Lease = typename Cache::Lease;

  /// Made by OffloadScheduler::demand. @throws OutOfRange, StateError.
  Demand(Cache& cache, Transfers<B, Policy>& transfers, Trace& trace, const bool& closed,
         std::int32_t layer, std::int64_t step, const std::vector<std::int32_t>& experts,
         std::span<const std::uint8_t> counted, bool predicted)
      : cache_(cache),
        transfers_(transfers),
        trace_(trace),
        closed_(closed),
        layer_(layer),
        awaited_(std::make_shared<typename Transfers<B, Policy>::Awaited>()) {
    const std::lock_guard lock(cache_.mutex());
    for (const std::int32_t expert : experts)
      cache_.residency_locked({layer, expert});  // throws before anything is changed
    SIDA_EXPECTS(counted.empty() || counted.size() == experts.size(),
                 "demand: expected a flag for each of the " + std::to_string(experts.size()) +
                     " experts, got " + std::to_string(counted.size()));
    if (transfers_.calls_locked() > 0)
      throw StateError("demand: the layer call before has not ended");
    ++transfers_.calls_locked();
    LayerStats& stats = stats_locked();
    ++stats.calls;
    stats.predicted_calls += predicted;
    std::vector<bool> foretold;
    for (const std::int32_t expert : experts)
      foretold.push_back(cache_.forecast().next_use({layer, expert}) == step);
    cache_.forecast().begin_layer(layer, step, experts);
    transfers_.prefetches_locked().drop_before(step + 1);
    for (std::size_t i = 0; i < experts.size(); ++i)
      ask_locked({layer, experts[i]}, foretold[i], counted.empty() || counted[i] != 0, stats);
    cache_.changed().notify_all();
  }
  Demand(const Demand&) = delete;
  Demand& operator=(const Demand&) = delete;

  ~Demand() {
    std::vector<Lease> dropped;
    const std::lock_guard lock(cache_.mutex());
    --transfers_.calls_locked();
    transfers_.abandon_locked(awaited_);
    dropped.swap(awaited_->arrived);  // ends after the lock
    to_drop_.swap(dropped);
    cache_.changed().notify_all();
  }

  /// Experts that are resident now, pinned: at least one; waits for it, and the wait is exposed
  /// stall. Empty when all were handed out. Earlier leases must have ended.
  /// @throws what a load threw; StateError when the scheduler is closed meanwhile.
  std::vector<Lease> next_ready() {
    std::unique_lock lock(cache_.mutex());
    if (closed_) throw StateError("the scheduler was closed during a layer call");
    for (const ExpertId id : handed_out_) cache_.forecast().done(id);
    handed_out_.clear();
    awaited_->backlog -= std::exchange(in_hand_, 0);
    cache_.changed().notify_all();  // what these held back may go on
    if (resident_.empty() && awaited_->arrived.empty() && !awaited_->missing.empty()) wait(lock);
    if (closed_) throw StateError("the scheduler was closed during a layer call");
    if (awaited_->error) std::rethrow_exception(std::exchange(awaited_->error, nullptr));
    // What was waited for comes first, so that more can be loaded; then what was there, in small
    // groups as long as others wait for its slots.
    std::vector<Lease> ready = std::move(awaited_->arrived);
    awaited_->arrived.clear();
    in_hand_ = std::ssize(ready);
    constexpr std::size_t group = 4;
    while (!resident_.empty() && (awaited_->missing.empty() || ready.size() < group)) {
      ready.push_back(std::move(resident_.back()));
      resident_.pop_back();
    }
    for (const Lease& lease : ready) handed_out_.push_back(lease.id());
    return ready;
  }

 private:
  LayerStats& stats_locked() {
    return transfers_.stats_locked().layers[static_cast<std::size_t>(layer_)];
  }

  void ask_locked(ExpertId id, bool foretold, bool counted, LayerStats& stats) {
    const auto residency = cache_.residency_locked(id);
    stats.uses += counted;
    if (auto lease = cache_.try_lease_locked(id)) {
      stats.hits += counted;
      resident_.push_back(std::move(*lease));
      return;
    }
    const bool late = foretold || residency == Cache::Residency::loading;
    (late ? stats.late : stats.misses) += counted;
    awaited_->missing.push_back(id);
    transfers_.demand_locked(id, awaited_);
  }

  void wait(std::unique_lock<std::mutex>& lock) {
    const double begin = Trace::now();
    cache_.changed().wait(lock, [&] {
      if (closed_ || awaited_->error || !awaited_->arrived.empty()) return true;
      if (transfers_.is_stuck_locked())
        awaited_->error = std::make_exception_ptr(StateError(
            "next_ready: every slot is leased, so the missing experts can never come; drop the "
            "leases of a wave before asking for the next"));
      return awaited_->error != nullptr;
    });
    const double end = Trace::now();
    stats_locked().stall_seconds += end - begin;
    trace_.add({TraceKind::stall, {layer_, -1}, begin, end, 0, 0});
  }

  Cache& cache_;
  Transfers<B, Policy>& transfers_;
  Trace& trace_;
  const bool& closed_;
  std::int32_t layer_;
  std::vector<Lease> to_drop_;  // declared before what is dropped under the lock
  std::shared_ptr<typename Transfers<B, Policy>::Awaited> awaited_;
  std::vector<Lease> resident_;
  std::vector<ExpertId> handed_out_;
  std::int64_t in_hand_ = 0;  // of these, the ones that were waited for
};

}  // namespace sida
