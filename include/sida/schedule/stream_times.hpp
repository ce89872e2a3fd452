// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "sida/backend/backend.hpp"
#include "sida/schedule/trace.hpp"

namespace sida {

/// When work on a backend's streams took place that the host only began: it goes into the trace
/// some time after it is over, at the latest when settle() is called. Thread-safe; backend and
/// trace must outlive it.
///
/// For backends whose `is_complete(fence)` tells whether a fence is passed, and whose
/// `seconds_between(fence, fence)` the time from one to the other, both passed.
template <Backend B>
class StreamTimes {
 public:
  using Fence = typename B::Fence;

  StreamTimes(B& backend, Trace& trace, std::int32_t layers)
      : backend_(backend), trace_(trace), stalls_(static_cast<std::size_t>(layers)) {}
  StreamTimes(const StreamTimes&) = delete;
  StreamTimes& operator=(const StreamTimes&) = delete;

  // Both throw what the backend throws.

  /// A load that the host began at `load.begin` is over behind `end`.
  void add_load(const TraceEvent& load, const Fence& end) { add({load, {}, std::nullopt, end}); }
  /// A stream that computes a layer has passed `enqueued` and stands still until `arrival`, if that
  /// comes later.
  void add_stall(std::int32_t layer, const Fence& enqueued, const Fence& arrival) {
    add({{TraceKind::stall, {layer, -1}, 0, 0, 0, 0}, {}, enqueued, arrival});
  }

  /// Waits until all is over, and tells the trace of it.
  void settle() {
    const std::lock_guard lock(mutex_);
    while (!begun_.empty()) {
      const Begun& oldest = begun_.front();
      if (oldest.begin) backend_.synchronize(*oldest.begin);
      backend_.synchronize(oldest.end);
      tell_oldest();
    }
  }
  /// By layer, the seconds of stall that went into the trace since this was called last.
  std::vector<double> take_stalls() {
    const std::lock_guard lock(mutex_);
    return std::exchange(stalls_, std::vector<double>(stalls_.size()));
  }

 private:
  /// A fence that was passed at a known time of the host.
  struct Clock {
    Fence mark;
    double time;
  };
  struct Begun {
    TraceEvent event;
    std::shared_ptr<const Clock> clock;
    std::optional<Fence> begin;
    Fence end;
  };

  // Tells of up to two others, so that they never pile up.
  void add(Begun begun) {
    const std::lock_guard lock(mutex_);
    begun.clock = clock();
    for (int i = 0; i < 2 && !begun_.empty() && is_over(begun_.front()); ++i) tell_oldest();
    begun_.push_back(std::move(begun));
  }
  bool is_over(const Begun& begun) {
    return (!begun.begin || backend_.is_complete(*begun.begin)) && backend_.is_complete(begun.end);
  }

  // Compared anew each second: the clocks of host and device drift.
  const std::shared_ptr<const Clock>& clock() {
    const double now = Trace::now();
    if (clock_ && now - clock_->time < 1) return clock_;
    if (!idle_) idle_.emplace(backend_.make_stream());
    Clock compared{backend_.fence(*idle_), 0};
    backend_.synchronize(compared.mark);
    compared.time = (now + Trace::now()) / 2;
    clock_ = std::make_shared<const Clock>(std::move(compared));
    return clock_;
  }
  double time_of(const Clock& clock, const Fence& fence) const {
    return clock.time + backend_.seconds_between(clock.mark, fence);
  }

  void tell_oldest() {
    const Begun& oldest = begun_.front();
    TraceEvent event = oldest.event;
    event.end = time_of(*oldest.clock, oldest.end);
    if (oldest.begin) event.begin = time_of(*oldest.clock, *oldest.begin);
    // Loads on demand follow one another on one stream.
    if (event.kind == TraceKind::demand_load)
      event.begin = std::max(event.begin, std::exchange(demands_end_, event.end));
    event.end = std::max(event.end, event.begin);
    if (event.kind == TraceKind::stall)
      stalls_[static_cast<std::size_t>(event.id.layer)] += event.end - event.begin;
    trace_.add(event);
    begun_.pop_front();
  }

  B& backend_;
  Trace& trace_;
  std::mutex mutex_;
  std::optional<typename B::Stream> idle_;
  std::shared_ptr<const Clock> clock_;
  std::deque<Begun> begun_;
  std::vector<double> stalls_;
  double demands_end_ = 0;
};

}  // namespace sida
