// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string_view>
#include <vector>

#include "sida/core/expert_id.hpp"

namespace sida {

/// What a stretch of time in a trace was spent on.
enum class TraceKind : std::uint8_t { prefetch, demand_load, compute, stall, hash_building, pass };

constexpr std::string_view name_of(TraceKind kind) noexcept {
  switch (kind) {
    case TraceKind::prefetch:
      return "prefetch";
    case TraceKind::demand_load:
      return "demand load";
    case TraceKind::compute:
      return "compute";
    case TraceKind::stall:
      return "stall";
    case TraceKind::hash_building:
      return "hash building";
    case TraceKind::pass:
      return "pass";
  }
  return "?";
}

/// A stretch of time, in seconds of a steady clock.
struct TraceEvent {
  TraceKind kind = TraceKind::compute;
  ExpertId id;  ///< expert -1: of the whole layer; layer -1: of no layer
  double begin = 0;
  double end = 0;
  std::int64_t bytes = 0;  ///< of experts moved or computed
  std::int32_t lane = 0;   ///< which of several threads of a kind; of loads, the last is layers
};

/// The latest events, at most `capacity` of them: older ones make way. Thread-safe.
class Trace {
 public:
  explicit Trace(std::size_t capacity) : capacity_(capacity) {}

  static double now() noexcept {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
  }

  void add(const TraceEvent& event) {
    const std::lock_guard lock(mutex_);
    if (events_.size() < capacity_) {
      events_.push_back(event);
    } else if (capacity_ > 0) {
      events_[oldest_] = event;
      oldest_ = (oldest_ + 1) % capacity_;
    }
  }

  /// The events, oldest first.
  std::vector<TraceEvent> events() const {
    const std::lock_guard lock(mutex_);
    std::vector<TraceEvent> ordered(events_.begin() + static_cast<std::ptrdiff_t>(oldest_),
                                    events_.end());
    ordered.insert(ordered.end(), events_.begin(),
                   events_.begin() + static_cast<std::ptrdiff_t>(oldest_));
    return ordered;
  }

  void clear() {
    const std::lock_guard lock(mutex_);
    events_.clear();
    oldest_ = 0;
  }

 private:
  std::size_t capacity_;
  mutable std::mutex mutex_;
  std::vector<TraceEvent> events_;
  std::size_t oldest_ = 0;
};

}  // namespace sida
