// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "sida/core/error.hpp"
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

  /// Starts the thread. On it, `source` makes each table, nothing at the end, and is called only
  /// while fewer than `ahead` tables wait; `announce` is told of a table as soon as it is there and
  /// returns its first step. An exception of either reaches the caller of next(), behind the tables
  /// that were built before.
  HashBuilder(Source source, Announce announce, std::size_t ahead, Trace& trace)
      : queue_(ahead),
        thread_([this, source = std::move(source), announce = std::move(announce), &trace] {
          run(source, announce, trace);
        }) {}
  HashBuilder(const HashBuilder&) = delete;
  HashBuilder& operator=(const HashBuilder&) = delete;
  ~HashBuilder() { stop(); }

  /// Waits for the oldest table; nothing at the end.
  std::optional<BuiltTable> next() { return queue_.pop(); }

  /// No further table is begun, next() gives no more, and the thread has ended: waits for a source
  /// that is at work. Idempotent, from any other thread.
  void stop() {
    queue_.abandon();
    const std::lock_guard lock(join_mutex_);
    if (thread_.joinable()) thread_.join();
  }

  /// Whether the caller is the source.
  bool is_this_thread() const noexcept { return thread_.get_id() == std::this_thread::get_id(); }

 private:
  void run(const Source& source, const Announce& announce, Trace& trace) noexcept {
    std::exception_ptr error;
    try {
      while (queue_.wait_for_room()) {
        const double begin = Trace::now();
        std::optional<HashTable> table = source();
        if (!table) break;
        trace.add({TraceKind::hash_building, {-1, -1}, begin, Trace::now(), 0, 0});
        const std::int64_t step = announce(*table);
        if (!queue_.push({std::move(*table), step})) break;
      }
    } catch (...) {
      error = std::current_exception();
    }
    queue_.close(std::move(error));  // no reference is kept here: the caller may end it
  }

  BoundedQueue<BuiltTable> queue_;
  std::mutex join_mutex_;
  std::thread thread_;
};

}  // namespace sida
