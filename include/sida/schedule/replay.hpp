// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sida/cache/budget.hpp"
#include "sida/cache/cache_stats.hpp"
#include "sida/cache/expert_cache.hpp"
#include "sida/core/error.hpp"
#include "sida/schedule/belady.hpp"
#include "sida/schedule/layer_needs.hpp"
#include "sida/schedule/pass_steps.hpp"
#include "sida/schedule/transfer_queue.hpp"

namespace sida {

/// What a replay imagines.
struct ReplayOptions {
  std::int32_t experts = 0;    ///< in each layer
  std::size_t slab_bytes = 0;  ///< of one expert
  std::size_t staging_bytes = 0;
  Budget memory = Budget::fraction(1);
  std::size_t ahead = 16;  ///< hash tables built ahead; 0: none at all
  double bytes_per_second = std::numeric_limits<double>::infinity();
  double latency_seconds = 0;  ///< of each read, before its bytes
  double layer_seconds = 0;    ///< from one MoE layer's end to the experts of the next
  double expert_seconds = 0;   ///< computation of one expert
  TransferOptions transfers;
};

/// What a replay foretells of a run.
struct ReplayResult {
  CacheStats stats;
  double seconds = 0;  ///< of the whole run
  std::int64_t slots = 0;
};

namespace detail {

/// Memory that is never touched, without a limit.
class ImaginaryBackend {
 public:
  struct Stream {};
  struct Event {};
  struct Fence {
    void add(const Fence&) noexcept {}
  };
  static constexpr std::string_view name() noexcept { return "replay"; }
  void* allocate(std::size_t) noexcept { return this; }
  void deallocate(void*, std::size_t) noexcept {}
  Stream make_stream() noexcept { return {}; }
  Event make_event() noexcept { return {}; }
  void copy_async(void*, const void*, std::size_t, Stream&) noexcept {}
  void record(Event&, Stream&) noexcept {}
  void wait(Stream&, Event&) noexcept {}
  void synchronize(Event&) noexcept {}
  Fence fence(Stream&) noexcept { return {}; }
  void wait(Stream&, const Fence&) noexcept {}
  void synchronize(const Fence&) noexcept {}
  std::size_t available_bytes() const noexcept { return std::numeric_limits<std::size_t>::max(); }
};

/// Sizes without experts.
class ImaginaryStore : public ExpertStore {
 public:
  ImaginaryStore(std::int32_t layers, const ReplayOptions& options)
      : layers_(layers), options_(options) {}
  std::int32_t layers() const noexcept override { return layers_; }
  std::int32_t experts() const noexcept override { return options_.experts; }
  std::size_t slab_bytes() const noexcept override { return options_.slab_bytes; }
  std::size_t staging_bytes() const noexcept override { return options_.staging_bytes; }
  void read(ExpertId, std::size_t, std::span<std::byte>) override {}

 private:
  std::int32_t layers_;
  ReplayOptions options_;
};

/// Transfer threads and their link in imagined time: reads under way share the link equally, as
/// those of a ThrottledStore do.
template <class Cache>
class ImaginaryTransfers {
 public:
  using Queue = TransferQueue<Cache>;

  ImaginaryTransfers(Cache& cache, const ReplayOptions& options)
      : cache_(cache),
        options_(options),
        queue_(cache, options.transfers),
        lanes_(static_cast<std::size_t>(options.transfers.threads)) {}

  Queue& queue() noexcept { return queue_; }
  double now() const noexcept { return now_; }

  /// Lets the time pass until `time`.
  void advance_to(double time) {
    run_until(time, [] { return false; });
    now_ = time;
  }
  /// Lets the time pass until `is_over()`. @throws StateError where that would be never.
  template <class IsOver>
  void advance_until(IsOver&& is_over) {
    run_until(std::numeric_limits<double>::infinity(), is_over);
    if (!is_over()) throw StateError("replay: nothing is under way, and a layer waits for it");
  }

 private:
  struct Active {
    typename Queue::Load* load;
    std::size_t done = 0;
  };
  // A thread: a demand may come between the chunks of a prefetch, which then waits below it.
  struct Lane {
    std::vector<Active> loads;
    std::size_t chunk = 0;  // under way
    double begins = 0;      // when the chunk's latency is over
    double rest = 0;        // bytes of the chunk that have not crossed the link
    bool is_reading = false;
  };

  template <class IsOver>
  void run_until(double end, IsOver&& is_over) {
    for (;;) {
      for (Lane& lane : lanes_)
        if (!lane.is_reading) begin_chunk(lane);
      if (is_over()) return;
      const double next = next_event();
      if (next > end || next == std::numeric_limits<double>::infinity()) {
        if (end < std::numeric_limits<double>::infinity()) cross_until(end);
        return;
      }
      cross_until(next);
      now_ = next;
      for (Lane& lane : lanes_)
        if (lane.is_reading && lane.begins <= now_ && lane.rest <= 0) end_chunk(lane);
    }
  }

  bool is_crossing(const Lane& lane) const noexcept {
    return lane.is_reading && lane.begins <= now_;
  }
  double share() const noexcept {
    const auto crossing = std::count_if(lanes_.begin(), lanes_.end(),
                                        [&](const Lane& lane) { return is_crossing(lane); });
    return options_.bytes_per_second / static_cast<double>(std::max<std::ptrdiff_t>(crossing, 1));
  }
  double next_event() const noexcept {
    double next = std::numeric_limits<double>::infinity();
    const double rate = share();
    for (const Lane& lane : lanes_)
      if (lane.is_reading)
        next = std::min(next, is_crossing(lane) ? now_ + lane.rest / rate : lane.begins);
    return next;
  }
  void cross_until(double time) {
    const double rate = share();
    for (Lane& lane : lanes_) {
      if (!is_crossing(lane)) continue;
      // The very sum of next_event(): the read that this is the end of is across, whatever is lost
      // to rounding.
      const bool is_across = now_ + lane.rest / rate <= time;
      lane.rest = is_across ? 0 : std::max(0.0, lane.rest - rate * (time - now_));
    }
  }

  void begin_chunk(Lane& lane) {
    for (;;) {
      typename Queue::Load* next = nullptr;
      if (lane.loads.empty())
        next = queue_.begin_next();
      else if (!lane.loads.back().load->awaited)
        next = queue_.begin_demand();
      if (next) {
        lane.loads.push_back({next});
        continue;
      }
      if (lane.loads.empty()) return;
      lane.chunk =
          std::min(options_.transfers.chunk_bytes, cache_.slot_bytes() - lane.loads.back().done);
      lane.rest = static_cast<double>(lane.chunk);
      lane.begins = now_ + options_.latency_seconds;
      lane.is_reading = true;
      return;
    }
  }
  void end_chunk(Lane& lane) {
    lane.is_reading = false;
    Active& active = lane.loads.back();
    active.done += lane.chunk;
    if (active.done < cache_.slot_bytes()) return;
    queue_.end(*active.load, active.done, nullptr);
    lane.loads.pop_back();
  }

  Cache& cache_;
  const ReplayOptions& options_;
  Queue queue_;
  std::vector<Lane> lanes_;
  double now_ = 0;
};

/// The inference thread in imagined time.
template <EvictionPolicy Policy>
class Replay {
 public:
  Replay(const HashTable& routing, const HashTable& foretold, const ReplayOptions& options)
      : options_(options),
        foretold_(foretold),
        batches_(uses_of(routing)),
        cache_(backend_, std::make_shared<ImaginaryStore>(routing.layers, options), options.memory),
        transfers_(cache_, options),
        steps_(cache_, transfers_.queue().prefetches()) {}

  ReplayResult run() {
    for (std::size_t batch = 0; batch < batches_.size(); ++batch) {
      if (options_.ahead > 0) {
        while (announced_.size() < std::min(batches_.size(), batch + options_.ahead)) announce();
        steps_.begin_announced(announced_[batch]);
        // Its place in the queue of tables is free.
        if (announced_.size() < batches_.size()) announce();
      } else {
        steps_.begin_unannounced({}, false);
      }
      ++transfers_.queue().stats().passes;
      transfers_.queue().stats().tables += options_.ahead > 0;
      for (std::int32_t layer = 0; layer < cache_.store().layers(); ++layer)
        call(layer, batches_[batch][static_cast<std::size_t>(layer)]);
      steps_.end();
    }
    cache_.waste_unread_locked();
    return {transfers_.queue().summary(), transfers_.now(), cache_.slots_locked()};
  }

 private:
  using Cache = ExpertCache<ImaginaryBackend, Policy>;

  void announce() {
    const auto table = foretold_.slice(static_cast<std::int64_t>(announced_.size()));
    announced_.push_back(steps_.announce(steps_.plan_of(table)));
  }

  void call(std::int32_t layer, const LayerUses& uses) {
    transfers_.advance_to(transfers_.now() + options_.layer_seconds);
    if (uses.experts.empty()) return;  // nobody recorded that it was called
    LayerNeeds<Cache> needs(cache_, transfers_.queue(), layer);
    needs.ask(steps_.first() + layer, uses.experts, uses.counted, false);
    for (;;) {
      needs.begin_wave();
      if (needs.must_wait()) {
        const double begin = transfers_.now();
        transfers_.advance_until([&] { return needs.is_over_waiting(); });
        needs.stats().stall_seconds += transfers_.now() - begin;
      }
      const auto leases = needs.take();
      if (leases.empty()) break;
      transfers_.advance_to(transfers_.now() +
                            options_.expert_seconds * static_cast<double>(leases.size()));
    }
    needs.end();
  }

  ReplayOptions options_;
  const HashTable& foretold_;
  std::vector<std::vector<LayerUses>> batches_;
  ImaginaryBackend backend_;
  Cache cache_;
  ImaginaryTransfers<Cache> transfers_;
  PassSteps<Cache> steps_;
  std::vector<std::int64_t> announced_;  // first steps
};

}  // namespace detail

/// What a run would do: the recorded routing, batch by batch, through the scheduler's own decisions
/// in imagined time, with no bytes moved and no thread started.
///
/// `foretold` are the hash tables of the same batches: `routing` itself is what a perfect predictor
/// gives. Both are as RoutingRecorder::table() makes them.
/// @throws InvalidArgument if the tables are not of the same batches or not valid, the budget
/// cannot be right, or a time or rate is negative.
template <EvictionPolicy Policy>
ReplayResult replay(const HashTable& routing, const HashTable& foretold,
                    const ReplayOptions& options) {
  routing.validate(options.experts);
  foretold.validate(options.experts);
  SIDA_EXPECTS(foretold.layers == routing.layers && foretold.keys == routing.keys,
               "replay: expected hash tables of the " + std::to_string(routing.batches()) +
                   " recorded batches and " + std::to_string(routing.layers) +
                   " layers, got tables of other batches or layers");
  SIDA_EXPECTS(options.slab_bytes > 0 && options.bytes_per_second > 0 &&
                   options.latency_seconds >= 0 && options.layer_seconds >= 0 &&
                   options.expert_seconds >= 0,
               "replay: expected experts of one byte or more, a bandwidth above 0, and times that "
               "are not negative");
  return detail::Replay<Policy>(routing, foretold, options).run();
}

}  // namespace sida
