// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <exception>
#include <mutex>
#include <optional>
#include <utility>

namespace sida {

/// Hands values from one thread to another, in order, at most `capacity` of them waiting: a full
/// queue holds the producer back. Thread-safe.
template <class T>
class BoundedQueue {
 public:
  explicit BoundedQueue(std::size_t capacity) : capacity_(capacity) {}

  /// Waits until a value could be pushed. False if the queue was closed. For a producer that is to
  /// begin nothing before there is room for it.
  bool wait_for_room() {
    std::unique_lock lock(mutex_);
    return room(lock);
  }

  /// Waits until there is room. False if the queue was closed: the value was not taken.
  bool push(T value) {
    std::unique_lock lock(mutex_);
    if (!room(lock)) return false;
    values_.push_back(std::move(value));
    changed_.notify_all();
    return true;
  }

  /// Waits for the oldest value. Nothing once the queue is closed and empty; then rethrows, once,
  /// the exception that it was closed with.
  std::optional<T> pop() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return closed_ || !values_.empty(); });
    if (values_.empty()) {
      if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
      return std::nullopt;
    }
    T value = std::move(values_.front());
    values_.pop_front();
    changed_.notify_all();
    return value;
  }

  /// Waits until pop() need not wait, `longest` at most. False if it still would.
  bool wait_for_value(std::chrono::milliseconds longest) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, longest, [&] { return closed_ || !values_.empty(); });
  }

  /// No more values come. What waits can still be taken.
  void close(std::exception_ptr error = nullptr) {
    const std::lock_guard lock(mutex_);
    if (closed_) return;
    closed_ = true;
    error_ = std::move(error);
    changed_.notify_all();
  }

  /// Closes the queue and drops what waits, an exception too.
  void abandon() {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    error_ = nullptr;
    values_.clear();
    changed_.notify_all();
  }

 private:
  bool room(std::unique_lock<std::mutex>& lock) {
    changed_.wait(lock, [&] { return closed_ || values_.size() < capacity_; });
    return !closed_;
  }

  std::size_t capacity_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<T> values_;
  std::exception_ptr error_;
  bool closed_ = false;
};

}  // namespace sida
