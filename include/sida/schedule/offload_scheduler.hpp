// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sida/cache/cache_stats.hpp"
#include "sida/cache/expert_cache.hpp"
#include "sida/hash/hash_table.hpp"
#include "sida/schedule/demand.hpp"
#include "sida/schedule/hash_builder.hpp"
#include "sida/schedule/offload_plan.hpp"
#include "sida/schedule/routing_recorder.hpp"
#include "sida/schedule/trace.hpp"
#include "sida/schedule/transfers.hpp"

namespace sida {

/// How an OffloadScheduler works.
struct SchedulerOptions {
  TransferOptions transfers;
  double threshold = 0.3;                  ///< experts wanted less surely are not brought early
  std::size_t trace_events = 1u << 16;     ///< kept at most
  std::size_t recorded_bytes = 64u << 20;  ///< of routing kept at most
};

/// Where prediction meets residency: hash tables, built some batches ahead on a thread of its own,
/// say which experts come early; the layer at hand says which it needs now.
///
/// A *pass* is one walk through the layers for one batch. Passes, and the layers in them, come one
/// after the other; who calls from several threads takes turns with `turn()`. stats(), trace() and
/// close() may be called at any time. The cache must outlive the scheduler.
template <Backend B, EvictionPolicy Policy>
class OffloadScheduler {
 public:
  using Cache = ExpertCache<B, Policy>;
  using Lease = typename Cache::Lease;

  OffloadScheduler(B& backend, Cache& cache, const SchedulerOptions& options = {})
      : cache_(cache),
        options_(options),
        trace_(options.trace_events),
        recorder_(cache.store().layers(), options.recorded_bytes),
        transfers_(backend, cache, options.transfers, trace_) {
    SIDA_EXPECTS(options.transfers.threads > 0 && options.transfers.chunk_bytes > 0,
                 "OffloadScheduler: expected one transfer thread or more, and chunks of one byte "
                 "or more");
    transfers_.stats_locked().layers.resize(static_cast<std::size_t>(layers()));
  }
  OffloadScheduler(const OffloadScheduler&) = delete;
  OffloadScheduler& operator=(const OffloadScheduler&) = delete;
  ~OffloadScheduler() { close(); }

  std::int32_t layers() const noexcept { return cache_.store().layers(); }
  std::int32_t experts() const noexcept { return cache_.store().experts(); }
  Cache& cache() const noexcept { return cache_; }
  Trace& trace() noexcept { return trace_; }
  RoutingRecorder& recorder() noexcept { return recorder_; }

  /// Held by whoever makes a pass or a layer call, so that calls from several threads take turns.
  std::unique_lock<std::recursive_mutex> turn() { return std::unique_lock(turn_); }

  /// Starts the hash-building thread: `source` is called on it for one table of one batch after the
  /// other, nothing at the end; at most `ahead` tables wait.
  /// @throws StateError if a thread is at work already, or after close().
  void start(HashBuilder::Source source, std::size_t ahead) {
    SIDA_EXPECTS(ahead > 0, "start: expected ahead > 0, got 0");
    const std::lock_guard lock(builder_mutex_);
    expect_open();
    if (builder_) throw StateError("start: tables are being built already; call stop() first");
    builder_ = std::make_shared<HashBuilder>(
        std::move(source), [this](const HashTable& table) { return announce(table); }, ahead);
  }

  /// Begins the pass of the oldest table that was built ahead; waits for it. False at the end.
  /// @throws what the source threw; StateError without start() or after close().
  bool next_batch() {
    std::shared_ptr<HashBuilder> builder;
    {
      const std::lock_guard lock(builder_mutex_);
      expect_open();
      if (!builder_) throw StateError("next_batch: no tables are being built; call start() first");
      builder = builder_;
    }
    std::optional<BuiltTable> built = builder->next();
    expect_open();
    if (!built) return false;
    const std::uint64_t key = built->table.keys[0];
    begin(std::move(built->table), key, {}, built->first_step);
    return true;
  }

  /// Ends the hash-building thread, waiting for a source that is at work, and forgets its tables.
  void stop() {
    std::shared_ptr<HashBuilder> builder;
    {
      const std::lock_guard lock(builder_mutex_);
      builder = std::exchange(builder_, nullptr);
    }
    if (!builder) return;
    builder->close();
    builder.reset();
    const std::lock_guard lock(cache_.mutex());
    cache_.forecast().forget();
    transfers_.forget_plan_locked();
  }

  /// Begins a pass with a table that the caller built, or none. `key` names the batch in what is
  /// recorded. @throws InvalidArgument if the table is not of one batch and this model.
  void begin_pass(std::optional<HashTable> table, std::uint64_t key,
                  std::span<const std::uint8_t> mask) {
    expect_open();
    std::int64_t step = 0;
    if (table) {
      step = announce(*table, true);
    } else {
      const std::lock_guard lock(cache_.mutex());
      step = between_tables();
    }
    begin(std::move(table), key, mask, step);
  }

  /// Gives the pass at hand its mask (nonzero: token), for a table that was built ahead.
  void set_mask(std::span<const std::uint8_t> mask) { mask_.assign(mask.begin(), mask.end()); }

  /// Ends the pass: its table is forgotten.
  void end_pass() {
    recorder_.end_pass();
    table_.reset();
    mask_.clear();
    const std::lock_guard lock(cache_.mutex());
    cache_.forecast().advance(first_step_ + layers());
    cache_.changed().notify_all();
  }

  const HashTable* table() const noexcept { return table_ ? &*table_ : nullptr; }
  std::uint64_t key() const noexcept { return key_; }
  std::span<const std::uint8_t> mask() const noexcept { return mask_; }

  /// Asks for the experts that a layer needs now. `counted[i]` is 0 where padding alone needs the
  /// expert. The demand ends before the next one of the same scheduler begins.
  /// @throws OutOfRange, StateError after close().
  Demand<B, Policy> demand(std::int32_t layer, const std::vector<std::int32_t>& experts,
                           std::span<const std::uint8_t> counted, bool predicted) {
    expect_open();
    return Demand<B, Policy>(cache_, transfers_, trace_, closed_, layer, first_step_ + layer,
                             experts, counted, predicted);
  }

  CacheStats stats() const {
    const std::lock_guard lock(cache_.mutex());
    CacheStats stats = transfers_.stats_locked();
    for (const LayerStats& layer : stats.layers) stats.total += layer;
    stats.wasted = cache_.wasted_locked();
    stats.bytes_wasted = stats.wasted * static_cast<std::int64_t>(cache_.slot_bytes());
    return stats;
  }

  /// Statistics, trace and recorded routing begin anew.
  void reset_stats() {
    trace_.clear();
    recorder_.clear();
    const std::lock_guard lock(cache_.mutex());
    CacheStats fresh;
    fresh.layers.resize(static_cast<std::size_t>(layers()));
    transfers_.stats_locked() = fresh;
    cache_.reset_wasted_locked();
  }

  /// Replaces the cache's arena, between two layer calls. @throws as ExpertCache::resize.
  void resize(const Budget& budget) {
    const auto mine = turn();
    expect_open();
    cache_.resize(budget);
  }

  /// Ends all threads. A layer call under way, and every call that follows, throws StateError.
  /// Idempotent; from any thread but the hash-building one.
  void close() {
    {
      const std::lock_guard lock(cache_.mutex());
      closed_ = true;
    }
    cache_.changed().notify_all();
    stop();
    transfers_.stop();
  }

 private:
  void expect_open() const {
    const std::lock_guard lock(cache_.mutex());
    if (closed_) throw StateError("the scheduler was closed");
  }

  // Passes with a table begin at even multiples of the number of layers, in the order in which the
  // tables were built; passes without one lie in the gap behind the table that began last.
  std::int64_t between_tables() const noexcept { return last_begun_ + layers(); }

  std::int64_t announce(const HashTable& table, bool now = false) {
    SIDA_EXPECTS(table.batches() == 1 && table.layers == layers(),
                 "expected a hash table of one batch and " + std::to_string(layers()) +
                     " layers, got " + std::to_string(table.batches()) + " batches and " +
                     std::to_string(table.layers) + " layers");
    table.validate(experts());
    const std::lock_guard lock(cache_.mutex());
    const bool others_wait = last_announced_ > last_begun_;
    const std::int64_t step =
        now && others_wait ? between_tables() : last_announced_ + 2 * layers();
    const OffloadPlan plan = plan_uses(table, experts(), step, options_.threshold);
    if (!(now && others_wait)) {  // a table out of turn serves the routing of its pass alone
      last_announced_ = step;
      for (const PlannedUse& use : plan) cache_.forecast().add(use.id, use.step);
      transfers_.plan_locked(plan);
      cache_.changed().notify_all();
    }
    return step;
  }

  void begin(std::optional<HashTable> table, std::uint64_t key, std::span<const std::uint8_t> mask,
             std::int64_t first_step) {
    recorder_.begin_pass(key);
    key_ = key;
    mask_.assign(mask.begin(), mask.end());
    table_ = std::move(table);
    first_step_ = first_step;
    const std::lock_guard lock(cache_.mutex());
    ++transfers_.stats_locked().passes;
    transfers_.stats_locked().tables += table_.has_value();
    if (table_ && first_step == last_announced_) last_begun_ = first_step;
    if (table_ && first_step > last_begun_) last_begun_ = first_step;
    cache_.forecast().advance(first_step);
    cache_.changed().notify_all();
  }

  Cache& cache_;
  SchedulerOptions options_;
  Trace trace_;
  RoutingRecorder recorder_;
  mutable Transfers<B, Policy> transfers_;
  std::recursive_mutex turn_;
  std::mutex builder_mutex_;
  std::shared_ptr<HashBuilder> builder_;
  std::optional<HashTable> table_;
  std::vector<std::uint8_t> mask_;
  std::uint64_t key_ = 0;
  std::int64_t first_step_ = 0;
  std::int64_t last_announced_ = 0;
  std::int64_t last_begun_ = 0;
  bool closed_ = false;
};

}  // namespace sida
