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
#include "sida/schedule/offload_plan.hpp"
#include "sida/schedule/slab_loader.hpp"
#include "sida/schedule/trace.hpp"

namespace sida {

/// How the transfer threads work.
struct TransferOptions {
  int threads = 2;                     ///< loads under way at once
  std::size_t chunk_bytes = 4u << 20;  ///< a demand waits for at most one chunk a thread
  std::int64_t uses_ahead = 4;         ///< how far prefetch reaches where slots are short
};

/// The transfer threads: bring experts from the store into the cache's slots. What a layer waits
/// for comes before what is planned, also between the chunks of a prefetch that is under way.
///
/// A prefetch evicts only what is used later than itself. An expert that is known to be used again
/// makes way only for the next `uses_ahead` uses: reaching further moves more bytes than it hides.
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
    std::exception_ptr error;                    ///< of a load
    bool abandoned = false;                      ///< nobody waits any more
  };

  Transfers(B& backend, Cache& cache, const TransferOptions& options, Trace& trace)
      : cache_(cache), loader_(backend), options_(options), trace_(trace) {
    for (int i = 0; i < options.threads; ++i) threads_.emplace_back([this, i] { run(i); });
  }
  Transfers(const Transfers&) = delete;
  Transfers& operator=(const Transfers&) = delete;
  ~Transfers() { stop(); }

  /// Ends the threads; loads under way are given up at their next chunk. Idempotent.
  void stop() {
    {
      const std::lock_guard lock(cache_.mutex());
      stopping_ = true;
    }
    cache_.changed().notify_all();
    for (std::thread& thread : threads_)
      if (thread.joinable()) thread.join();
  }

  /// Asks for an expert that a layer needs now and that is not resident.
  void demand_locked(ExpertId id, std::shared_ptr<Awaited> awaited) {
    for (Job* job : under_way_) {
      if (job->id == id) {
        job->awaited = std::move(awaited);
        return;
      }
    }
    demands_.push_back({id, std::move(awaited)});
  }

  /// Forgets the demands of a call that is not waiting any more.
  void abandon_locked(const std::shared_ptr<Awaited>& awaited) {
    awaited->abandoned = true;
    std::erase_if(demands_, [&](const Job& job) { return job.awaited == awaited; });
  }

  void plan_locked(const OffloadPlan& plan) { plan_.insert(plan_.end(), plan.begin(), plan.end()); }
  void forget_plan_locked() { plan_.clear(); }
  /// Drops what was planned for steps before `step`.
  void drop_plan_before_locked(std::int64_t step) {
    while (!plan_.empty() && plan_.front().step < step) plan_.pop_front();
  }

  CacheStats& stats_locked() noexcept { return stats_; }

 private:
  struct Job {
    ExpertId id;
    std::shared_ptr<Awaited> awaited;  // null: a prefetch
  };
  using Lock = std::unique_lock<std::mutex>;

  void run(int lane) noexcept {
    Lock lock(cache_.mutex());
    while (!stopping_) {
      const bool served = demands_.empty() ? prefetch(lock, lane) : serve_demand(lock, lane);
      if (!served && !stopping_) cache_.changed().wait(lock);
    }
  }

  bool serve_demand(Lock& lock, int lane) {
    for (std::size_t i = 0; i < demands_.size(); ++i) {
      auto loading = cache_.reserve_locked(demands_[i].id, [](ExpertId) { return true; });
      if (!loading) continue;
      Job job = std::move(demands_[i]);
      demands_.erase(demands_.begin() + static_cast<std::ptrdiff_t>(i));
      load(lock, std::move(*loading), job, lane);
      return true;
    }
    return false;
  }

  bool prefetch(Lock& lock, int lane) {
    drop_plan_before_locked(cache_.forecast().now());
    std::int64_t position = 0;
    for (const PlannedUse& use : plan_) {
      if (cache_.residency_locked(use.id) == Cache::Residency::absent && !failed(use.id)) {
        const auto may_evict = [&](ExpertId victim) {
          const auto next = cache_.forecast().next_use(victim);
          return !next || (*next > use.step && position < options_.uses_ahead);
        };
        auto loading = cache_.reserve_locked(use.id, may_evict);
        if (!loading) return false;
        Job job{use.id, nullptr};
        load(lock, std::move(*loading), job, lane);
        return true;
      }
      ++position;
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
      if (!job.awaited && !demands_.empty()) serve_demand(lock, lane);
      const std::size_t chunk = std::min(options_.chunk_bytes, bytes - done);
      lock.unlock();
      try {
        loader_.load(cache_.store(), job.id, done, chunk, loading.slab());
      } catch (...) {
        error = std::current_exception();
      }
      lock.lock();
      done += chunk;
    }
    under_way_.erase(place);
    stats_.bytes_moved += static_cast<std::int64_t>(done);
    trace_.add({prefetched ? TraceKind::prefetch : TraceKind::demand_load, job.id, begin,
                Trace::now(), static_cast<std::int64_t>(done), lane});
    if (error || done < bytes) {
      give_up(lock, std::move(loading), job, prefetched, error);
    } else {
      arrive(lock, cache_.commit_locked(std::move(loading), prefetched), job);
    }
    cache_.changed().notify_all();
  }

  void give_up(Lock& lock, typename Cache::Loading loading, const Job& job, bool prefetched,
               const std::exception_ptr& error) {
    if (prefetched && error) {
      ++stats_.failed_prefetches;
      failed_.push_back(job.id);
      // Somebody came to wait for it: the load is tried once more, as a demand.
      if (job.awaited && !job.awaited->abandoned) demands_.push_front(job);
    } else if (job.awaited) {
      job.awaited->error = error;
    }
    lock.unlock();
    { const auto dropped = std::move(loading); }
    lock.lock();
  }

  void arrive(Lock& lock, typename Cache::Lease lease, const Job& job) {
    std::erase(failed_, job.id);
    if (job.awaited && !job.awaited->abandoned) {
      cache_.mark_used_locked(lease);
      std::erase(job.awaited->missing, job.id);
      job.awaited->arrived.push_back(std::move(lease));
      return;
    }
    lock.unlock();
    { const auto dropped = std::move(lease); }
    lock.lock();
  }

  // A prefetch that failed is not tried again by itself, only on demand.
  bool failed(ExpertId id) const {
    return std::find(failed_.begin(), failed_.end(), id) != failed_.end();
  }

  Cache& cache_;
  SlabLoader<B> loader_;
  TransferOptions options_;
  Trace& trace_;
  CacheStats stats_;
  std::deque<Job> demands_;
  std::deque<PlannedUse> plan_;
  std::list<Job*> under_way_;
  std::vector<ExpertId> failed_;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace sida
