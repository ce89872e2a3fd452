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
#include "sida/schedule/trace.hpp"
#include "sida/schedule/transfer_queue.hpp"

namespace sida {

/// The transfer threads: bring what a TransferQueue decides from the store into the cache's slots.
/// A demand goes before the chunks of a prefetch that is under way.
template <Backend B, EvictionPolicy Policy>
class Transfers {
 public:
  using Cache = ExpertCache<B, Policy>;
  using Queue = TransferQueue<Cache>;

  Transfers(B& backend, Cache& cache, const TransferOptions& options, Trace& trace)
      : cache_(cache),
        loader_(backend),
        chunk_bytes_(options.chunk_bytes),
        trace_(trace),
        queue_(cache, options) {
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

  /// What is to be brought; guarded by the cache's mutex.
  Queue& queue() noexcept { return queue_; }
  const Queue& queue() const noexcept { return queue_; }

 private:
  using Lock = std::unique_lock<std::mutex>;

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
        loader_.load(cache_.store(), id, done, chunk, slab, load.slot.readers(), is_awaited);
        done += chunk;
      } catch (...) {
        error = std::current_exception();
      }
      lock.lock();
    }
    trace_.add({prefetched ? TraceKind::prefetch : TraceKind::demand_load, id, begin, Trace::now(),
                static_cast<std::int64_t>(done), lane});
    queue_.end(load, done, error);
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
  Trace& trace_;
  Queue queue_;
  bool stopping_ = false;
  std::mutex join_mutex_;
  std::vector<std::thread> threads_;
};

}  // namespace sida
