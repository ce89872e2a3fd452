// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

namespace sida {

/// How well look-ahead knew what a layer needs, see RouterLookAhead.
struct LookAheadStats {
  std::int64_t uses = 0;           ///< in the calls for which experts were foretold
  std::int64_t foretold = 0;       ///< experts, for these calls
  std::int64_t foretold_uses = 0;  ///< uses of experts that were foretold

  LookAheadStats& operator+=(const LookAheadStats& other) noexcept {
    uses += other.uses;
    foretold += other.foretold;
    foretold_uses += other.foretold_uses;
    return *this;
  }
};

/// Counts of one MoE layer. A *use* is one expert in one layer call: a *hit* if the expert was
/// resident when the layer asked, *late* if it had been asked for and was queued or under way, else
/// a *miss*; hits + late + misses = uses. Experts that only padding needs count in none of them.
struct LayerStats {
  std::int64_t calls = 0;
  std::int64_t predicted_calls = 0;  ///< calls whose routing came from a hash table
  std::int64_t uses = 0;
  std::int64_t hits = 0;
  std::int64_t late = 0;
  std::int64_t misses = 0;
  /// Computation stood still because an expert was not there: the thread that computes, or, for
  /// loads that only began (see SlabLoader), the stream.
  double stall_seconds = 0;
  LookAheadStats look_ahead;

  LayerStats& operator+=(const LayerStats& other) noexcept {
    calls += other.calls;
    predicted_calls += other.predicted_calls;
    uses += other.uses;
    hits += other.hits;
    late += other.late;
    misses += other.misses;
    stall_seconds += other.stall_seconds;
    look_ahead += other.look_ahead;
    return *this;
  }
};

/// What happened since the statistics were last reset.
struct CacheStats {
  LayerStats total;
  std::vector<LayerStats> layers;
  std::int64_t loads = 0;              ///< experts brought to fast memory, prefetches among them
  std::int64_t prefetches = 0;         ///< loads that no layer was waiting for when they began
  std::int64_t wasted = 0;             ///< prefetches evicted, or left at close, unread
  std::int64_t failed_prefetches = 0;  ///< prefetches given up because the store failed
  std::int64_t look_ahead_loads = 0;   ///< prefetches of experts that look-ahead named
  std::int64_t look_ahead_used = 0;    ///< of these, the ones that a layer read
  std::int64_t look_ahead_wasted = 0;  ///< of these, the ones that are among `wasted`
  /// Of these, the ones that were given up half-way, as the layer turned out not to need them.
  std::int64_t look_ahead_cancelled = 0;
  std::int64_t bytes_moved = 0;
  std::int64_t bytes_wasted = 0;
  std::int64_t passes = 0;
  std::int64_t tables = 0;  ///< passes that had a hash table
};

}  // namespace sida
