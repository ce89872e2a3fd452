// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>
#include <vector>

#include "sida/core/error.hpp"
#include "sida/schedule/layer_needs.hpp"
#include "sida/schedule/trace.hpp"
#include "sida/schedule/transfers.hpp"

namespace sida {

/// The experts that one layer call needs, handed out as they are resident: those that are there at
/// once, the others while these compute. With fewer slots than experts this goes in waves.
///
/// Where loads only have to be begun (see SlabLoader), an expert is resident, and handed out, once
/// its load has begun: what reads it waits for the lease's arrival().
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
         std::span<const std::uint8_t> counted, bool predicted, bool is_call = true)
      : cache_(cache),
        transfers_(transfers),
        trace_(trace),
        closed_(closed),
        layer_(layer),
        needs_(cache, transfers.queue(), layer) {
    std::unique_lock lock(cache_.mutex());
    needs_.ask(step, experts, counted, predicted, is_call);
    try {
      transfers_.begin_loads(lock);
      transfers_.queue().wake();
    } catch (...) {  // for want of memory
      needs_.end();
      throw;
    }
  }
  Demand(const Demand&) = delete;
  Demand& operator=(const Demand&) = delete;

  ~Demand() {
    const std::lock_guard lock(cache_.mutex());
    needs_.end();
  }

  /// Experts that are resident now, pinned: at least one; waits for it, and the wait is exposed
  /// stall. Empty when all were handed out. Earlier leases must have ended.
  /// @throws what a load threw; StateError when the scheduler is closed meanwhile.
  std::vector<Lease> next_ready() {
    std::unique_lock lock(cache_.mutex());
    expect_open();
    if (needs_.begin_wave()) {
      transfers_.begin_loads(lock);
      transfers_.queue().wake();  // what the wave held back may go on
    }
    if (needs_.must_wait()) wait(lock);
    expect_open();
    if constexpr (Transfers<B, Policy>::may_only_begin)
      return needs_.take_begun();
    else
      return needs_.take();
  }

  /// Whether all were handed out.
  bool is_over() const {
    const std::lock_guard lock(cache_.mutex());
    return needs_.is_over();
  }

 private:
  void expect_open() const {
    if (closed_) throw StateError("the scheduler was closed during a layer call");
  }

  void wait(std::unique_lock<std::mutex>& lock) {
    const double begin = Trace::now();
    while (!closed_ && !needs_.is_over_waiting()) {
      if (transfers_.begin_loads(lock)) {  // into slots that have become free since
        transfers_.queue().wake();
        continue;
      }
      // For loads that only have to be begun; the others' are looked for by transfer threads.
      if constexpr (Transfers<B, Policy>::may_only_begin)
        cache_.want_slot_locked(transfers_.queue().has_demands());
      cache_.changed().wait(lock);
    }
    const double end = Trace::now();
    needs_.stats().stall_seconds += end - begin;
    trace_.add({TraceKind::stall, {layer_, -1}, begin, end, 0, 0});
  }

  Cache& cache_;
  Transfers<B, Policy>& transfers_;
  Trace& trace_;
  const bool& closed_;
  std::int32_t layer_;
  LayerNeeds<Cache> needs_;
};

}  // namespace sida
