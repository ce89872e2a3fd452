// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "sida/core/error.hpp"
#include "sida/core/thread.hpp"
#include "sida/hash/hash_table.hpp"
#include "sida/schedule/bounded_queue.hpp"
#include "sida/schedule/trace.hpp"

namespace sida {

/// A hash table that was built ahead, and the step at which its pass begins.
struct BuiltTable {
  HashTable table;
  std::int64_t first_step = 0;
};

/// The hash-building thread (paper §3.2): calls `source` for one table after the other, some
/// batches ahead of the inference thread, and hands them over through a bounded queue.
class HashBuilder {
 public:
  using Source = std::function<std::optional<HashTable>()>;
  using Announce = std::function<std::int64_t(const HashTable&)>;
  using Seconds = std::chrono::duration<double>;

  static constexpr Seconds for_ever{std::numeric_limits<double>::infinity()};

  /// Starts the thread. On it, `source` makes each table, nothing at the end, and is called only
  /// while fewer than `ahead` tables wait; `announce` is told of a table as soon as it is there and
  /// returns its first step. An exception of either reaches the caller of next(), behind the tables
  /// that were built before. stop() waits `patience` for a source that is at work; what the source
  /// refers to must outlive the source where that is not `for_ever`. @throws ThreadError.
  HashBuilder(Source source, Announce announce, std::size_t ahead, Trace& trace,
              Seconds patience = for_ever)
      : patience_(patience),
        work_(std::make_shared<Work>(std::move(source), std::move(announce), ahead, trace)),
        thread_(start_thread("that builds hash tables", [work = work_] { run(*work); })) {}
  HashBuilder(const HashBuilder&) = delete;
  HashBuilder& operator=(const HashBuilder&) = delete;
  ~HashBuilder() { stop(); }

  /// Waits for the oldest table; nothing at the end.
  std::optional<BuiltTable> next() { return work_->queue.pop(); }

  /// Waits until next() need not wait, `longest` at most. False if it still would.
  bool wait_for_next(std::chrono::milliseconds longest) {
    return work_->queue.wait_for_value(longest);
  }

  /// No further table is begun, next() gives no more, and the thread has ended: waits for a source
  /// that is at work. Where that takes longer than its patience the thread is left behind: it ends
  /// when the source returns, and what that gives is dropped. Idempotent, from any other thread.
  void stop() {
    work_->queue.abandon();
    const std::lock_guard lock(join_mutex_);
    if (!thread_.joinable()) return;
    if (work_->leave_behind_after(patience_))
      thread_.detach();
    else
      thread_.join();
  }

  /// Whether the caller is the source.
  bool is_this_thread() const noexcept { return work_->thread == std::this_thread::get_id(); }

 private:
  // Shared with the thread, which may be left behind. While it is in the source it may outlive
  // whatever `announce` and `trace` refer to, at other times not.
  struct Work {
    Work(Source source_, Announce announce_, std::size_t ahead, Trace& trace_)
        : queue(ahead), source(std::move(source_)), announce(std::move(announce_)), trace(trace_) {}

    /// Waits until the thread is out of the source; whether it is left there.
    bool leave_behind_after(Seconds patience) {
      std::unique_lock lock(mutex);
      stopped = true;
      const auto is_out = [this] { return !in_source; };
      if (std::isinf(patience.count()))
        changed.wait(lock, is_out);
      else
        changed.wait_for(lock, patience, is_out);
      return left_behind = in_source;
    }

    /// What the source makes next; nothing, without asking it, after a stop.
    std::optional<HashTable> next_table() {
      {
        const std::lock_guard lock(mutex);
        if (stopped) return std::nullopt;
        in_source = true;
      }
      const auto leave = [this] {
        const std::lock_guard lock(mutex);
        in_source = false;
        changed.notify_all();
      };
      try {
        std::optional<HashTable> table = source();
        leave();
        return table;
      } catch (...) {
        leave();
        throw;
      }
    }

    bool is_left_behind() {
      const std::lock_guard lock(mutex);
      return left_behind;
    }

    BoundedQueue<BuiltTable> queue;
    Source source;
    Announce announce;
    Trace& trace;
    std::atomic<std::thread::id> thread;
    std::mutex mutex;
    std::condition_variable changed;
    bool stopped = false, in_source = false, left_behind = false;
  };

  static void run(Work& work) noexcept {
    work.thread = std::this_thread::get_id();
    std::exception_ptr error;
    try {
      while (work.queue.wait_for_room()) {
        const double begin = Trace::now();
        std::optional<HashTable> table = work.next_table();
        if (!table || work.is_left_behind()) break;
        work.trace.add({TraceKind::hash_building, {-1, -1}, begin, Trace::now(), 0, 0});
        const std::int64_t step = work.announce(*table);
        if (!work.queue.push({std::move(*table), step})) break;
      }
    } catch (...) {
      error = std::current_exception();
    }
    work.queue.close(std::move(error));  // no reference is kept here: the caller may end it
  }

  Seconds patience_;
  std::shared_ptr<Work> work_;
  std::mutex join_mutex_;
  std::thread thread_;
};

}  // namespace sida
