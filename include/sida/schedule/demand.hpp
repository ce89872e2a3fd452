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
        trace_(trace),
        closed_(closed),
        layer_(layer),
        needs_(cache, transfers.queue(), layer) {
    const std::lock_guard lock(cache_.mutex());
    needs_.ask(step, experts, counted, predicted);
  }
  Demand(const Demand&) = delete;
  Demand& operator=(const Demand&) = delete;

  ~Demand() {
    const std::lock_guard lock(cache_.mutex());
    needs_.end();
  }

  /// Experts that are resident now, pinned: at least one; waits for it, and the wait is exposed
  /// stall. Empty when all were handed out. Earlier leases must have ended.
  ///
  /// While others are on their way, what was resident from the start comes in groups: small ones,
  /// whose slots are soon free, where computing takes its time; `group` may be more where it is
  /// only begun, and slots are given back at once.
  /// @throws what a load threw; StateError when the scheduler is closed meanwhile.
  std::vector<Lease> next_ready(std::size_t group = LayerNeeds<Cache>::small_group) {
    std::unique_lock lock(cache_.mutex());
    expect_open();
    needs_.begin_wave();
    if (needs_.must_wait()) wait(lock);
    expect_open();
    return needs_.take(group);
  }

 private:
  void expect_open() const {
    if (closed_) throw StateError("the scheduler was closed during a layer call");
  }

  void wait(std::unique_lock<std::mutex>& lock) {
    const double begin = Trace::now();
    cache_.changed().wait(lock, [&] { return closed_ || needs_.is_over_waiting(); });
    const double end = Trace::now();
    needs_.stats().stall_seconds += end - begin;
    trace_.add({TraceKind::stall, {layer_, -1}, begin, end, 0, 0});
  }

  Cache& cache_;
  Trace& trace_;
  const bool& closed_;
  std::int32_t layer_;
  LayerNeeds<Cache> needs_;
};

}  // namespace sida
