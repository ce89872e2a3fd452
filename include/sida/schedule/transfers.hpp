// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "sida/cache/expert_cache.hpp"
#include "sida/core/thread.hpp"
#include "sida/schedule/slab_loader.hpp"
#include "sida/schedule/stream_times.hpp"
#include "sida/schedule/trace.hpp"
#include "sida/schedule/transfer_queue.hpp"

namespace sida {

/// The transfer threads: bring what a TransferQueue decides from the store into the cache's slots.
/// A demand goes before the chunks of a prefetch that is under way; where its load only has to be
/// begun, who waits for it does so.
template <Backend B, EvictionPolicy Policy>
class Transfers {
 public:
  using Cache = ExpertCache<B, Policy>;
  using Queue = TransferQueue<Cache>;
  using Lock = std::unique_lock<std::mutex>;
  /// Whether loads may be such that they only have to be begun, see SlabLoader.
  static constexpr bool may_only_begin = SlabLoader<B>::may_only_begin;

  Transfers(B& backend, Cache& cache, const TransferOptions& options, Trace& trace)
      : cache_(cache),
        loader_(backend),
        chunk_bytes_(options.chunk_bytes),
        lane_of_who_waits_(options.threads),
        trace_(trace),
        times_(backend, trace, cache.store().layers()),
        queue_(cache, options, [this](ExpertId id) { return only_begins(id); }) {
    try {
      for (int lane = 0; lane < options.threads; ++lane)
        threads_.push_back(start_thread("for transfers", [this, lane] { run(lane); }));
    } catch (...) {
      stop();
      throw;
    }
  }
  Transfers(const Transfers&) = delete;
  Transfers& operator=(const Transfers&) = delete;
  ~Transfers() { stop(); }

  /// Ends the threads; loads under way are given up at their next chunk. Idempotent.
  void stop() {
    {
      const std::lock_guard lock(cache_.mutex());
      stopping_ = true;
      cache_.changed().notify_all();
    }
    const std::lock_guard lock(join_mutex_);
    for (std::thread& thread : threads_)
      if (thread.joinable()) thread.join();
  }

  /// Begins, with the cache's lock held, the loads for who waits that only have to be begun, as far
  /// as there are slots for them; whether there were any. To be called by who waits.
  bool begin_loads(Lock& lock) {
    bool any = false;
    if constexpr (may_only_begin)
      while (!stopping_) {
        typename Queue::Load* const next = queue_.begin_demand(true);
        if (!next) break;
        load(lock, *next, lane_of_who_waits_);
        any = true;
      }
    return any;
  }

  /// Of loads that were only begun, and of waits for them.
  StreamTimes<B>& times() noexcept { return times_; }

  /// What is to be brought; guarded by the cache's mutex.
  Queue& queue() noexcept { return queue_; }
  const Queue& queue() const noexcept { return queue_; }

 private:
  // Whether a load of the expert that somebody waits for only has to be begun.
  bool only_begins(ExpertId id) const {
    if constexpr (may_only_begin)
      return SlabLoader<B>::only_begins(cache_.store(), id);
    else
      return false;
  }

  void run(int lane) noexcept {
    Lock lock(cache_.mutex());
    while (!stopping_) {
      if (typename Queue::Load* next = queue_.begin_next()) {
        load(lock, *next, lane);
        continue;
      }
      cache_.want_slot_locked(queue_.has_demands());
      cache_.changed().wait(lock);
    }
  }

  // Loads the expert in chunks, unlocked; the queue commits or gives up its slot.
  void load(Lock& lock, typename Queue::Load& load, int lane) {
    const double begin = Trace::now();
    const ExpertId id = load.id;
    const bool prefetched = load.loaded_for != LoadedFor::demand;
    std::byte* const slab = load.slot.slab();
    std::exception_ptr error;
    typename B::Fence arrival;
    bool only_began = false;
    std::size_t done = 0;
    while (done < cache_.slot_bytes() && !error && !stopping_) {
      if (!load.awaited) serve_demands(lock, lane);
      if (stopping_ || queue_.is_obsolete(load)) break;
      const bool is_awaited = load.awaited != nullptr;
      const std::size_t rest = cache_.slot_bytes() - done;
      const bool is_split = !is_awaited || SlabLoader<B>::splits_awaited;
      const std::size_t chunk = is_split ? std::min(chunk_bytes_, rest) : rest;
      lock.unlock();
      try {
        arrival =
            loader_.load(cache_.store(), id, done, chunk, slab, load.slot.readers(), is_awaited);
        only_began = is_awaited && only_begins(id);
        done += chunk;
      } catch (...) {
        error = std::current_exception();
      }
      lock.lock();
    }
    note({prefetched ? TraceKind::prefetch : TraceKind::demand_load, id, begin, Trace::now(),
          static_cast<std::int64_t>(done), lane},
         only_began ? &arrival : nullptr);
    queue_.end(load, done, error, arrival);
  }
  // A load that is over, or will be behind `arrival`.
  void note(const TraceEvent& event, const typename B::Fence* arrival) noexcept {
    if constexpr (may_only_begin)
      if (arrival) try {
          return times_.add_load(event, *arrival);
        } catch (...) {  // it is told as of now
        }
    trace_.add(event);
  }

  // Demands that came while a prefetch that nobody waits for is under way.
  void serve_demands(Lock& lock, int lane) {
    while (!stopping_) {
      typename Queue::Load* const urgent = queue_.begin_demand();
      if (!urgent) return;
      load(lock, *urgent, lane);
    }
  }

  Cache& cache_;
  SlabLoader<B> loader_;
  std::size_t chunk_bytes_;
  std::int32_t lane_of_who_waits_;  // behind those of the threads
  Trace& trace_;
  StreamTimes<B> times_;
  Queue queue_;
  bool stopping_ = false;
  std::mutex join_mutex_;
  std::vector<std::thread> threads_;
};

}  // namespace sida
