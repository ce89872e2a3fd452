// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
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
#include "sida/schedule/pass_steps.hpp"
#include "sida/schedule/routing_recorder.hpp"
#include "sida/schedule/trace.hpp"
#include "sida/schedule/transfers.hpp"

namespace sida {

/// How an OffloadScheduler works.
struct SchedulerOptions {
  TransferOptions transfers;
  std::size_t trace_events = 1u << 16;     ///< kept at most
  std::size_t recorded_bytes = 64u << 20;  ///< of routing kept at most
  /// Seconds for which stop() and close() wait for a source of tables that is at work. After that
  /// its thread is left behind, see HashBuilder: what the source refers to must outlive the source.
  HashBuilder::Seconds source_patience = HashBuilder::for_ever;
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
        transfers_(backend, cache, options.transfers, trace_),
        steps_(cache, transfers_.queue().prefetches()) {
    SIDA_EXPECTS(options.transfers.threads > 0 && options.transfers.chunk_bytes > 0,
                 "OffloadScheduler: expected one transfer thread or more, and chunks of one byte "
                 "or more");
  }
  OffloadScheduler(const OffloadScheduler&) = delete;
  OffloadScheduler& operator=(const OffloadScheduler&) = delete;
  ~OffloadScheduler() {
    try {
      settle();
    } catch (...) {  // nobody reads the counts any more
    }
    close();
  }

  std::int32_t layers() const noexcept { return cache_.store().layers(); }
  std::int32_t experts() const noexcept { return cache_.store().experts(); }
  Cache& cache() const noexcept { return cache_; }
  Trace& trace() noexcept { return trace_; }
  RoutingRecorder& recorder() noexcept { return recorder_; }

  /// Backends whose calls go on after they returned account for them later: `settle` has that done
  /// for all calls so far. It is called, on any thread, before counts and routing are read.
  void set_settle(std::function<void()> settle) {
    const std::lock_guard lock(settle_mutex_);
    settle_ = std::move(settle);
  }

  /// What was traced, oldest first. @throws what settling throws.
  std::vector<TraceEvent> traced() {
    settle();
    return trace_.events();
  }
  /// The routing of the passes that have ended, see RoutingRecorder. @throws what settling throws.
  HashTable recorded() {
    settle();
    return recorder_.table();
  }

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
        std::move(source), [this](const HashTable& table) { return announce(table); }, ahead,
        trace_, options_.source_patience);
  }

  /// Waits until next_batch() need not wait for a table, `longest` at most. False if it still
  /// would.
  bool wait_for_batch(std::chrono::milliseconds longest) {
    std::shared_ptr<HashBuilder> builder;
    {
      const std::lock_guard lock(builder_mutex_);
      builder = builder_;
    }
    return !builder || builder->wait_for_next(longest);
  }

  /// Begins the pass of the oldest table that was built ahead; waits for it. False at the end, or
  /// when stop() ends the wait.
  /// @throws what the source threw, behind the tables that it made before; StateError without
  /// start() or after close().
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
    const auto mine = turn();
    const std::uint64_t key = built->table.keys[0];
    const std::lock_guard lock(cache_.mutex());
    begin_locked(std::move(built->table), key, {});
    steps_.begin_announced(built->first_step);
    transfers_.queue().wake();
    return true;
  }

  /// Ends the hash-building thread, waiting for a source that is at work as long as
  /// `source_patience` says, and forgets its tables;
  /// the pass at hand keeps its own. Not to be called by the source.
  void stop() {
    std::shared_ptr<HashBuilder> builder;
    {
      const std::lock_guard lock(builder_mutex_);
      if (builder_ && builder_->is_this_thread())
        throw StateError("the source of hash tables cannot stop its own thread");
      builder = std::exchange(builder_, nullptr);
    }
    if (!builder) return;
    builder->stop();
    const std::lock_guard lock(cache_.mutex());
    steps_.forget_announced();
  }

  /// Begins a pass with a table that the caller built, or none; tables that were built ahead keep
  /// their order. `key` names the batch in what is recorded; `mask` is nonzero for tokens, 0 for
  /// padding, or empty.
  /// @throws InvalidArgument if the table is not of one batch and this model.
  void begin_pass(std::optional<HashTable> table, std::uint64_t key,
                  std::span<const std::uint8_t> mask) {
    OffloadPlan plan;
    if (table) plan = plan_of(*table);
    const auto mine = turn();
    expect_open();
    const std::lock_guard lock(cache_.mutex());
    const bool has_table = table.has_value();
    begin_locked(std::move(table), key, mask);
    steps_.begin_unannounced(std::move(plan), has_table);
    transfers_.queue().wake();
  }

  /// Gives the pass at hand its mask (nonzero: token), for a table that was built ahead.
  void set_mask(std::span<const std::uint8_t> mask) {
    const auto mine = turn();
    mask_.assign(mask.begin(), mask.end());
  }

  /// Names the batch of the pass at hand, which began without its key.
  void set_key(std::uint64_t key) {
    const auto mine = turn();
    recorder_.set_key(key);
    key_ = key;
  }

  /// Ends the pass: its table is forgotten.
  void end_pass() {
    const auto mine = turn();
    recorder_.end_pass();
    const std::lock_guard lock(cache_.mutex());
    end_locked();
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
    return Demand<B, Policy>(cache_, transfers_, trace_, closed_, layer, steps_.first() + layer,
                             experts, counted, predicted);
  }

  /// Asks for all experts of a layer, which no call needs; else as demand().
  Demand<B, Policy> demand_all(std::int32_t layer) {
    expect_open();
    std::vector<std::int32_t> all(static_cast<std::size_t>(experts()));
    std::iota(all.begin(), all.end(), 0);
    const std::vector<std::uint8_t> uncounted(all.size(), 0);
    return Demand<B, Policy>(cache_, transfers_, trace_, closed_, layer, steps_.first() + layer,
                             all, uncounted, false, false);
  }

  /// Whether it is of use to look ahead from a layer of the pass at hand: not all experts have a
  /// slot. A hash table and look-ahead know different things, so that there may be both.
  bool wants_look_ahead() {
    const auto mine = turn();
    const std::lock_guard lock(cache_.mutex());
    return cache_.slots_locked() < cache_.total_experts();
  }

  /// Tells what the router of a layer chooses on an earlier layer's input: the experts may be
  /// brought before the layer asks, see RouterLookAhead. Replaces what was told before.
  /// @throws OutOfRange.
  void look_ahead(std::int32_t layer, std::span<const RouterChoice> choices) {
    const auto mine = turn();
    const std::lock_guard lock(cache_.mutex());
    transfers_.queue().look_ahead().foretell({layer, steps_.first() + layer}, choices);
    transfers_.queue().wake();
  }

  /// A layer's computation stands still on its stream, once it has passed `enqueued`, until experts
  /// arrive whose loads have begun. @throws what the backend throws.
  void add_stall(std::int32_t layer, const typename B::Fence& enqueued,
                 const typename B::Fence& arrival) {
    transfers_.times().add_stall(layer, enqueued, arrival);
  }

  /// Counts a layer call that needed experts of a layer that stays, see ExpertCache::kept_locked;
  /// `counted` is as in demand().
  void count_resident(std::int32_t layer, const std::vector<std::int32_t>& experts,
                      std::span<const std::uint8_t> counted, bool predicted) {
    const std::lock_guard lock(cache_.mutex());
    LayerStats& stats = transfers_.queue().stats().layers[static_cast<std::size_t>(layer)];
    ++stats.calls;
    stats.predicted_calls += predicted;
    for (std::size_t i = 0; i < experts.size(); ++i) {
      const bool counts = counted.empty() || counted[i] != 0;
      stats.uses += counts;
      stats.hits += counts;
      cache_.touch_locked({layer, experts[i]});
    }
  }

  /// What happened since the last reset. Experts that were brought early and not yet read count as
  /// wasted when they are evicted, or when the scheduler is closed.
  /// @throws what settling throws.
  CacheStats stats() {
    settle();
    const std::lock_guard lock(cache_.mutex());
    return transfers_.queue().summary();
  }

  /// Statistics, trace and recorded routing begin anew.
  void reset_stats() {
    settle();
    trace_.clear();
    recorder_.clear();
    const std::lock_guard lock(cache_.mutex());
    CacheStats fresh;
    fresh.layers.resize(static_cast<std::size_t>(layers()));
    transfers_.queue().stats() = fresh;
    cache_.reset_prefetched_locked();
  }

  /// Replaces the cache's arena, between two layer calls; waits for the one at hand.
  /// @throws as ExpertCache::resize; StateError from within a layer call, or after close().
  void resize(const Budget& budget) {
    const auto mine = turn();
    expect_open();
    settle();  // calls that hold no leases may still read the arena
    {
      const std::lock_guard lock(cache_.mutex());
      if (transfers_.queue().calls() > 0) throw StateError("resize: a layer call is under way");
    }
    cache_.resize(budget);
  }

  /// Ends all threads; waits for a source of tables that is at work as stop() does. A layer call
  /// under way, and every call that follows, throws StateError. Idempotent; from any thread but the
  /// hash-building one.
  void close() {
    {
      const std::lock_guard lock(cache_.mutex());
      closed_ = true;
      cache_.changed().notify_all();
    }
    stop();
    transfers_.stop();
    const std::lock_guard lock(cache_.mutex());
    cache_.waste_unread_locked();
  }

 private:
  void settle() {
    std::function<void()> settle;
    {
      const std::lock_guard lock(settle_mutex_);
      settle = settle_;
    }
    if (settle) settle();
    if constexpr (Transfers<B, Policy>::may_only_begin) {
      transfers_.times().settle();
      const std::vector<double> stalls = transfers_.times().take_stalls();
      const std::lock_guard lock(cache_.mutex());
      for (std::size_t layer = 0; layer < stalls.size(); ++layer)
        transfers_.queue().stats().layers[layer].stall_seconds += stalls[layer];
    }
  }
  void expect_open() const {
    const std::lock_guard lock(cache_.mutex());
    if (closed_) throw StateError("the scheduler was closed");
  }

  /// The uses that a table foretells, with steps from 0.
  OffloadPlan plan_of(const HashTable& table) const {
    SIDA_EXPECTS(table.batches() == 1 && table.layers == layers(),
                 "expected a hash table of one batch and " + std::to_string(layers()) +
                     " layers, got " + std::to_string(table.batches()) + " batches and " +
                     std::to_string(table.layers) + " layers");
    table.validate(experts());
    return steps_.plan_of(table);
  }
  std::int64_t announce(const HashTable& table) {
    OffloadPlan plan = plan_of(table);
    const std::lock_guard lock(cache_.mutex());
    const std::int64_t first_step = steps_.announce(std::move(plan));
    transfers_.queue().wake();
    return first_step;
  }

  void begin_locked(std::optional<HashTable> table, std::uint64_t key,
                    std::span<const std::uint8_t> mask) {
    end_locked();
    recorder_.begin_pass(key);
    key_ = key;
    mask_.assign(mask.begin(), mask.end());
    table_ = std::move(table);
    pass_began_ = Trace::now();
    in_pass_ = true;
    ++transfers_.queue().stats().passes;
    transfers_.queue().stats().tables += table_.has_value();
  }
  void end_locked() {
    transfers_.queue().look_ahead().forget();
    if (!std::exchange(in_pass_, false)) return;
    trace_.add({TraceKind::pass, {-1, -1}, pass_began_, Trace::now(), 0, 0});
    table_.reset();
    mask_.clear();
    steps_.end();
    transfers_.queue().wake();
  }

  Cache& cache_;
  SchedulerOptions options_;
  Trace trace_;
  RoutingRecorder recorder_;
  Transfers<B, Policy> transfers_;
  PassSteps<Cache> steps_;
  std::recursive_mutex turn_;
  std::mutex settle_mutex_;
  std::function<void()> settle_;
  std::mutex builder_mutex_;
  std::shared_ptr<HashBuilder> builder_;
  std::optional<HashTable> table_;
  std::vector<std::uint8_t> mask_;
  std::uint64_t key_ = 0;
  double pass_began_ = 0;
  bool in_pass_ = false;
  bool closed_ = false;
};

}  // namespace sida
