// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "sida/cache/cache_stats.hpp"
#include "sida/cache/expert_cache.hpp"
#include "sida/schedule/prefetch_queue.hpp"
#include "sida/schedule/slab_loader.hpp"
#include "sida/schedule/trace.hpp"

namespace sida {

/// How the transfer threads work.
struct TransferOptions {
  int threads = 2;                     ///< loads under way at once
  std::size_t chunk_bytes = 4u << 20;  ///< a demand waits for at most one chunk a thread
  /// Where slots are short: for how many uses ahead of the computation, prefetched or demanded,
  /// experts make way that are used again sooner than those. Fewer with few slots.
  std::int64_t uses_ahead = 4;
};

/// The transfer threads: bring experts from the store into the cache's slots. What a layer waits
/// for comes before what is planned, also between the chunks of a prefetch that is under way.
///
/// All state is guarded by the cache's mutex; members ending in _locked expect it to be held.
template <Backend B, EvictionPolicy Policy>
class Transfers {
 public:
  using Cache = ExpertCache<B, Policy>;

  /// What one layer call waits for; shared with the threads that load it.
  struct Awaited {
    std::vector<ExpertId> missing;               ///< not yet arrived
    std::vector<typename Cache::Lease> arrived;  ///< pinned as they became resident
    std::int64_t backlog = 0;                    ///< begun to load, and not yet computed
    std::exception_ptr error;                    ///< of a load
    bool abandoned = false;                      ///< nobody waits any more
  };

  Transfers(B& backend, Cache& cache, const TransferOptions& options, Trace& trace)
      : cache_(cache), loader_(backend), options_(options), trace_(trace), prefetches_(cache) {
    stats_.layers.resize(static_cast<std::size_t>(cache.store().layers()));
    try {
      for (int lane = 0; lane < options.threads; ++lane)
        threads_.emplace_back([this, lane] { run(lane); });
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

  /// Asks for an expert that a layer needs now and that is not resident.
  void demand_locked(ExpertId id, const std::shared_ptr<Awaited>& awaited) {
    if (join_under_way(id, awaited))
      ++awaited->backlog;
    else
      demands_.push_back({id, awaited});
  }

  /// Forgets the demands of a call that is not waiting any more.
  void abandon_locked(const std::shared_ptr<Awaited>& awaited) {
    awaited->abandoned = true;
    std::erase_if(demands_, [&](const Job& job) { return job.awaited == awaited; });
  }

  /// True if nothing is on the way to a call that waits, and nothing can be: no load is under way
  /// and every slot is leased.
  bool is_stuck_locked() const { return under_way_.empty() && cache_.unpinned_locked() == 0; }

  /// Layer calls under way: none or one.
  int& calls_locked() noexcept { return calls_; }
  PrefetchQueue<Cache>& prefetches_locked() noexcept { return prefetches_; }
  CacheStats& stats_locked() noexcept { return stats_; }
  const CacheStats& stats_locked() const noexcept { return stats_; }

 private:
  struct Job {
    ExpertId id;
    std::shared_ptr<Awaited> awaited;  // null: a prefetch
  };
  using Lock = std::unique_lock<std::mutex>;

  void run(int lane) noexcept {
    Lock lock(cache_.mutex());
    while (!stopping_) {
      if (demands_.empty() ? prefetch(lock, lane) : serve_demand(lock, lane)) continue;
      cache_.want_slot_locked(!demands_.empty());
      cache_.changed().wait(lock);
    }
  }

  // Loads the oldest demand; false if there is none, or no slot for it.
  bool serve_demand(Lock& lock, int lane) {
    if (stopping_ || demands_.empty()) return false;
    Job job = demands_.front();
    std::optional<typename Cache::Loading> loading;
    try {
      loading =
          cache_.reserve_locked(job.id, [&](ExpertId victim) { return is_fair(job, victim); });
    } catch (...) {  // of the policy
      job.awaited->error = std::current_exception();
    }
    // Without a slot, unless somebody else brought the expert or is about to.
    if (!loading && !job.awaited->error && !join_under_way(job.id, job.awaited) && !hand_over(job))
      return false;
    std::erase_if(demands_, [&](const Job& other) {
      return other.id == job.id && other.awaited == job.awaited;
    });
    ++job.awaited->backlog;
    if (loading)
      load(lock, std::move(*loading), job, lane);
    else
      cache_.changed().notify_all();
    return true;
  }

  bool prefetch(Lock& lock, int lane) {
    if (cache_.draining_locked()) return false;
    std::optional<typename Cache::Loading> loading;
    try {
      loading = prefetches_.reserve_next(reach());
    } catch (...) {  // of the policy: the layer that needs the expert meets it again
      ++stats_.failed_prefetches;
      prefetches_.drop_from(cache_.forecast().now());
    }
    if (!loading) return false;
    Job job{loading->id(), nullptr};
    load(lock, std::move(*loading), job, lane);
    return true;
  }

  bool join_under_way(ExpertId id, const std::shared_ptr<Awaited>& awaited) {
    for (Job* job : under_way_) {
      if (job->id != id) continue;
      job->awaited = awaited;
      return true;
    }
    return false;
  }

  // Loads the expert in chunks, unlocked; commits or gives up the slot.
  void load(Lock& lock, typename Cache::Loading loading, Job& job, int lane) {
    const auto place = under_way_.insert(under_way_.end(), &job);
    const bool prefetched = job.awaited == nullptr;
    ++stats_.loads;
    stats_.prefetches += prefetched;
    const double begin = Trace::now();
    std::exception_ptr error;
    const std::size_t bytes = cache_.slot_bytes();
    std::size_t done = 0;
    while (done < bytes && !error && !stopping_) {
      while (!job.awaited && serve_demand(lock, lane)) continue;
      const std::size_t chunk = std::min(options_.chunk_bytes, bytes - done);
      lock.unlock();
      try {
        loader_.load(cache_.store(), job.id, done, chunk, loading.slab());
        done += chunk;
      } catch (...) {
        error = std::current_exception();
      }
      lock.lock();
    }
    under_way_.erase(place);
    stats_.bytes_moved += static_cast<std::int64_t>(done);
    trace_.add({prefetched ? TraceKind::prefetch : TraceKind::demand_load, job.id, begin,
                Trace::now(), static_cast<std::int64_t>(done), lane});
    if (done < bytes) {
      cache_.give_up_locked(std::move(loading));
      failed(job, prefetched, error);
    } else {
      cache_.commit_locked(std::move(loading), prefetched);
      if (is_waited_for(job)) hand_over(job);
    }
    cache_.changed().notify_all();
  }

  // Uses ahead of the computation for which other experts make way: with few slots fewer.
  std::int64_t reach() const noexcept {
    return std::min(options_.uses_ahead,
                    std::max<std::int64_t>(options_.threads, cache_.slots_locked() / 12));
  }
  // While computation has enough to go on with, a demand waits for a slot of its own layer rather
  // than taking it from an expert that is used sooner.
  bool is_fair(const Job& job, ExpertId victim) {
    if (job.awaited->backlog < std::max<std::int64_t>(reach(), 1)) return true;
    const UseForecast& forecast = cache_.forecast();
    return forecast.expected_use(victim) >= forecast.expected_use_after(job.id, forecast.now());
  }
  static bool is_waited_for(const Job& job) noexcept {
    return job.awaited && !job.awaited->abandoned;
  }
  void failed(const Job& job, bool prefetched, const std::exception_ptr& error) {
    if (prefetched && error) {
      ++stats_.failed_prefetches;
      prefetches_.give_up(job.id);
      // Somebody came to wait for it: it is tried once more, as a demand.
      if (is_waited_for(job)) demands_.push_front(job);
    } else if (is_waited_for(job)) {
      job.awaited->error = error;
    }
  }
  // Pins the expert, which is resident, for the call that waits for it.
  bool hand_over(const Job& job) {
    auto lease = cache_.try_lease_locked(job.id);
    if (!lease) return false;
    std::erase(job.awaited->missing, job.id);
    job.awaited->arrived.push_back(std::move(*lease));
    return true;
  }

  Cache& cache_;
  SlabLoader<B> loader_;
  TransferOptions options_;
  Trace& trace_;
  CacheStats stats_;
  std::deque<Job> demands_;
  PrefetchQueue<Cache> prefetches_;
  std::list<Job*> under_way_;
  int calls_ = 0;
  bool stopping_ = false;
  std::mutex join_mutex_;
  std::vector<std::thread> threads_;
};

}  // namespace sida
