// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstddef>
#include <limits>
#include <map>
#include <mutex>
#include <tuple>

#include "sida/backend/cpu_backend.hpp"
#include "sida/cache/fifo_policy.hpp"
#include "sida/cache/lfu_policy.hpp"
#include "sida/cache/look_ahead_policy.hpp"
#include "sida/cache/lru_policy.hpp"

namespace sida::test {

/// A backend and a policy: what a contract test is instantiated for.
template <Backend B, EvictionPolicy P>
struct Engine {
  using backend = B;
  using policy = P;
};

/// Every backend with every policy, for TEMPLATE_LIST_TEST_CASE.
using Engines = std::tuple<Engine<CpuBackend, FifoPolicy>, Engine<CpuBackend, LruPolicy>,
                           Engine<CpuBackend, LfuPolicy>, Engine<CpuBackend, LookAheadPolicy>>;

/// A CPU backend that counts what is allocated and can be short of memory.
class CountingBackend : public CpuBackend {
 public:
  void* allocate(std::size_t bytes) {
    void* const data = CpuBackend::allocate(bytes);
    const std::lock_guard lock(mutex_);
    allocated_ += bytes;
    peak_ = std::max(peak_, allocated_);
    return data;
  }
  void deallocate(void* data, std::size_t bytes) noexcept {
    CpuBackend::deallocate(data, bytes);
    const std::lock_guard lock(mutex_);
    allocated_ -= bytes;
  }
  std::size_t available_bytes() const noexcept { return available; }

  std::size_t allocated() const {
    const std::lock_guard lock(mutex_);
    return allocated_;
  }
  /// The most that was allocated at once.
  std::size_t peak() const {
    const std::lock_guard lock(mutex_);
    return peak_;
  }

  std::size_t available = std::numeric_limits<std::size_t>::max();

 private:
  mutable std::mutex mutex_;
  std::size_t allocated_ = 0, peak_ = 0;
};

/// Work on streams, by the stream's id, up to a place in it.
struct StreamPlaces {
  std::map<std::size_t, std::size_t> places;
  void add(const StreamPlaces& other) {
    for (const auto& [stream, place] : other.places)
      places[stream] = std::max(places[stream], place);
  }
};

/// A CPU backend whose streams run behind the host: what is enqueued on one is done once finish()
/// is called for it. Copies are done at once all the same.
class LateBackend : public CpuBackend {
 public:
  struct Stream {
    std::size_t id = 0;
  };
  using Fence = StreamPlaces;

  Stream make_stream() {
    const std::lock_guard lock(mutex_);
    return {next_stream_++};
  }
  void copy_async(void* to, const void* from, std::size_t bytes, Stream&) noexcept {
    CpuBackend::Stream stream;
    CpuBackend::copy_async(to, from, bytes, stream);
  }
  void record(Event&, Stream&) noexcept {}
  void wait(Stream&, Event&) noexcept {}
  using CpuBackend::synchronize;
  Fence fence(Stream& stream) {
    const std::lock_guard lock(mutex_);
    return {{{stream.id, ++enqueued_[stream.id]}}};
  }
  void wait(Stream&, const Fence&) noexcept {}
  void synchronize(const Fence& fence) {
    std::unique_lock lock(mutex_);
    ++waiting_;
    changed_.wait(lock, [&] { return is_passed(fence); });
    --waiting_;
  }

  /// What is on the stream so far is done.
  void finish(const Stream& stream) {
    const std::lock_guard lock(mutex_);
    done_[stream.id] = enqueued_[stream.id];
    changed_.notify_all();
  }
  bool passed(const Fence& fence) const {
    const std::lock_guard lock(mutex_);
    return is_passed(fence);
  }
  /// Whether a thread waits for a fence.
  bool is_waited_for() const {
    const std::lock_guard lock(mutex_);
    return waiting_ > 0;
  }

 private:
  bool is_passed(const Fence& fence) const {
    return std::all_of(fence.places.begin(), fence.places.end(), [&](const auto& place) {
      const auto done = done_.find(place.first);
      return done != done_.end() && done->second >= place.second;
    });
  }

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::map<std::size_t, std::size_t> enqueued_, done_;
  std::size_t next_stream_ = 0;
  int waiting_ = 0;
};

static_assert(Backend<LateBackend>);

}  // namespace sida::test
