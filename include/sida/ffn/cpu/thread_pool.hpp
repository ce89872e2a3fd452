// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "sida/core/error.hpp"
#include "sida/core/thread.hpp"

namespace sida {

/// Runs loops on a fixed number of threads, the caller's among them. Idle threads spin for some
/// microseconds, for the next loop usually follows at once, and then sleep. A thread that wakes
/// late takes part in what is left of a loop; nobody waits for it.
///
/// One loop at a time; not to be called from within a loop. Destruction joins the threads.
class ThreadPool {
 public:
  /// `threads`, the caller included, is 1 or more. @throws InvalidArgument, ThreadError.
  explicit ThreadPool(int threads) {
    SIDA_EXPECTS(threads >= 1, "threads: expected 1 or more, got " + std::to_string(threads));
    workers_.reserve(static_cast<std::size_t>(threads) - 1);
    try {
      for (int i = 1; i < threads; ++i)
        workers_.push_back(start_thread("that computes", [this] { work(); }));
    } catch (...) {
      stop();
      throw;
    }
  }
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;
  ~ThreadPool() { stop(); }

  int threads() const noexcept { return static_cast<int>(workers_.size()) + 1; }

  /// Calls body(i) once for each i in [0, count), on any thread, in any order; returns when all are
  /// done. When a call throws, those not yet begun are left out and the first exception is
  /// rethrown.
  template <class Body>
  void run(std::int64_t count, Body&& body) {
    if (workers_.empty() || count <= 1) {
      for (std::int64_t i = 0; i < count; ++i) body(i);
      return;
    }
    using Function = std::remove_reference_t<Body>;
    body_ = &body;
    call_ = [](const void* function, std::int64_t i) {
      (*static_cast<Function*>(const_cast<void*>(function)))(i);
    };
    count_ = count;
    next_.store(0, std::memory_order_relaxed);
    announce(open_bit);
    take_indices();
    finish();
  }

  /// Wakes the threads, so that they are there when the loop begins that is about to follow.
  void wake() {
    if (!workers_.empty()) announce(0);
  }

 private:
  using Call = void (*)(const void* body, std::int64_t index);

  // state_ counts announcements in its upper half, says in open_bit whether the loop of the last
  // may be joined, and below it how many workers are in it.
  static constexpr std::uint64_t open_bit = 1u << 16, announcement = std::uint64_t{1} << 32;

  void announce(std::uint64_t open) {
    {
      const std::lock_guard lock(mutex_);  // a worker is either before its check or waiting
      const std::uint64_t before = state_.load(std::memory_order_relaxed);
      state_.store((before / announcement + 1) * announcement + open, std::memory_order_release);
    }
    wake_.notify_all();
  }

  void take_indices() noexcept {
    try {
      for (;;) {
        const std::int64_t i = next_.fetch_add(1, std::memory_order_relaxed);
        if (i >= count_) return;
        call_(body_, i);
      }
    } catch (...) {
      next_.store(count_, std::memory_order_relaxed);
      const std::lock_guard lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
  }

  void finish() {
    state_.fetch_and(~open_bit, std::memory_order_acq_rel);
    const auto all_left = [this] {
      return state_.load(std::memory_order_acquire) % announcement == 0;
    };
    if (!spin(all_left)) {
      std::unique_lock lock(mutex_);
      done_.wait(lock, all_left);
    }
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

  void work() noexcept {
    std::uint64_t seen = 0;
    for (;;) {
      const auto changed = [&] {  // join() may have seen the last announcement of all
        return stopping_.load(std::memory_order_acquire) ||
               state_.load(std::memory_order_acquire) / announcement != seen;
      };
      if (!spin(changed)) {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, changed);
      }
      if (stopping_.load(std::memory_order_acquire)) return;
      if (!join(seen)) continue;
      take_indices();
      if (state_.fetch_sub(1, std::memory_order_acq_rel) % announcement == 1) {
        const std::lock_guard lock(mutex_);  // the caller is either before its check or waiting
        done_.notify_one();
      }
    }
  }

  /// Joins the loop announced last, if it is open. @returns whether; `seen` is its number.
  bool join(std::uint64_t& seen) noexcept {
    std::uint64_t state = state_.load(std::memory_order_acquire);
    do {
      seen = state / announcement;
      if (!(state & open_bit)) return false;
    } while (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel,
                                           std::memory_order_acquire));
    return true;
  }

  void stop() noexcept {
    stopping_.store(true, std::memory_order_release);
    announce(0);
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
  }

  template <class Condition>
  static bool spin(const Condition& condition) noexcept {
    constexpr int tries = 400;  // about 10 microseconds
    for (int i = 0; i < tries; ++i) {
      if (condition()) return true;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
    return false;
  }

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::atomic<std::uint64_t> state_{0};
  std::atomic<std::int64_t> next_{0};
  std::atomic<bool> stopping_{false};
  const void* body_ = nullptr;
  Call call_ = nullptr;
  std::int64_t count_ = 0;
  std::exception_ptr error_;
};

}  // namespace sida
