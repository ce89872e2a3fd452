// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <exception>
#include <functional>
#include <optional>
#include <thread>
#include <utility>

#include "sida/core/error.hpp"
#include "sida/hash/hash_table.hpp"
#include "sida/schedule/bounded_queue.hpp"

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

  /// Starts the thread. On it, `source` makes each table, nothing at the end; `announce` is told of
  /// a table as soon as it is there and returns its first step. An exception of either reaches the
  /// caller of next().
  HashBuilder(Source source, Announce announce, std::size_t ahead)
      : queue_(ahead), thread_([this, source = std::move(source), announce = std::move(announce)] {
          run(source, announce);
        }) {}
  HashBuilder(const HashBuilder&) = delete;
  HashBuilder& operator=(const HashBuilder&) = delete;
  /// Waits for a source that is at work.
  ~HashBuilder() {
    close();
    thread_.join();
  }

  /// Waits for the oldest table; nothing at the end.
  std::optional<BuiltTable> next() { return queue_.pop(); }

  /// No further table is begun, and next() gives no more.
  void close() {
    queue_.close();
    queue_.clear();
  }

 private:
  void run(const Source& source, const Announce& announce) noexcept {
    std::exception_ptr error;
    try {
      while (std::optional<HashTable> table = source()) {
        const std::int64_t step = announce(*table);
        if (!queue_.push({std::move(*table), step})) break;
      }
    } catch (...) {
      error = std::current_exception();
    }
    queue_.close(error);
  }

  BoundedQueue<BuiltTable> queue_;
  std::thread thread_;
};

}  // namespace sida
