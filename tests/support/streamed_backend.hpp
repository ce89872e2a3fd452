// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <utility>
#include <vector>

#include "sida/backend/cpu_backend.hpp"
#include "sida/core/error.hpp"
#include "sida/schedule/slab_loader.hpp"
#include "support/backends.hpp"
#include "support/pattern_store.hpp"

namespace sida::test {

/// When a StreamedBackend does what is on its streams: at the last moment, as soon as it can, or
/// some of it at random.
enum class Haste { none, all, some };

/// Streams like a GPU's, on the host: what is enqueued is done later, in the order of its stream
/// and behind what the stream waits for, by whichever thread makes it go on. Each stream has a
/// clock, on which a byte copied takes a nanosecond.
class StreamedBackend : public CpuBackend {
 public:
  struct Stream {
    std::size_t id = 0;
  };
  using Fence = StreamPlaces;

  explicit StreamedBackend(Haste haste = Haste::none) : haste_(haste) {}

  Stream make_stream() {
    const std::lock_guard lock(mutex_);
    work_.emplace_back();
    return {work_.size() - 1};
  }
  void copy_async(void* to, const void* from, std::size_t bytes, Stream& stream) {
    {
      const std::lock_guard lock(mutex_);
      if (std::exchange(fails_, false)) throw CudaError("a copy that was to fail");
    }
    enqueue(stream, {[to, from, bytes] { std::memcpy(to, from, bytes); }, {}, bytes});
  }
  /// Does `action` in the order of the stream.
  void call(Stream& stream, std::function<void()> action) {
    enqueue(stream, {std::move(action), {}, 0});
  }
  Fence fence(Stream& stream) {
    const std::lock_guard lock(mutex_);
    work_[stream.id].steps.push_back({});
    const Fence fence{{{stream.id, work_[stream.id].enqueued()}}};
    hasten();
    return fence;
  }
  void wait(Stream& stream, const Fence& fence) { enqueue(stream, {{}, fence, 0}); }
  void synchronize(const Fence& fence) {
    const std::lock_guard lock(mutex_);
    pass(fence);
  }
  bool is_complete(const Fence& fence) const {
    const std::lock_guard lock(mutex_);
    return std::ranges::all_of(fence.places, [&](const auto& place) {
      return work_[place.first].times.size() >= place.second;
    });
  }
  double seconds_between(const Fence& from, const Fence& to) const {
    const std::lock_guard lock(mutex_);
    return time_of(to) - time_of(from);
  }
  using CpuBackend::record;
  void record(Event&, Stream&) noexcept {}
  void wait(Stream&, Event&) noexcept {}
  using CpuBackend::synchronize;

  /// The next copy fails as it is enqueued.
  void fail_next_copy() {
    const std::lock_guard lock(mutex_);
    fails_ = true;
  }
  /// Bytes that were copied so far.
  std::size_t copied() const {
    const std::lock_guard lock(mutex_);
    return copied_;
  }

 private:
  struct Step {
    std::function<void()> action;
    Fence behind;
    std::size_t bytes = 0;
  };
  struct Work {
    std::deque<Step> steps;     // not yet done
    std::vector<double> times;  // when each of the others was done
    std::size_t enqueued() const { return steps.size() + times.size(); }
  };

  void enqueue(const Stream& stream, Step step) {
    const std::lock_guard lock(mutex_);
    work_[stream.id].steps.push_back(std::move(step));
    hasten();
  }
  void hasten() {
    for (std::size_t stream = 0; stream < work_.size(); ++stream) {
      const std::size_t left = work_[stream].steps.size();
      const std::size_t some = haste_ == Haste::some ? random_() % (left + 1) : 0;
      run(stream, work_[stream].times.size() + (haste_ == Haste::all ? left : some));
    }
  }
  void pass(const Fence& fence) {
    for (const auto& [stream, place] : fence.places) run(stream, place);
  }
  void run(std::size_t stream, std::size_t until) {
    while (work_[stream].times.size() < until) {
      const Step step = std::move(work_[stream].steps.front());
      pass(step.behind);  // of other streams, or earlier in this one
      Work& work = work_[stream];
      work.steps.pop_front();
      if (step.action) step.action();
      double time = work.times.empty() ? 0 : work.times.back();
      if (!step.behind.places.empty()) time = std::max(time, time_of(step.behind));
      work.times.push_back(time + static_cast<double>(step.bytes) * 1e-9);
      copied_ += step.bytes;
    }
  }
  double time_of(const Fence& fence) const {
    double time = 0;
    for (const auto& [stream, place] : fence.places)
      time = std::max(time, work_[stream].times.at(place - 1));
    return time;
  }

  Haste haste_;
  mutable std::mutex mutex_;
  std::vector<Work> work_;
  std::mt19937 random_{5};
  std::size_t copied_ = 0;
  bool fails_ = false;
};

/// Experts of which some lie in memory that a StreamedBackend's streams copy from.
class PartlyPinnedStore : public PatternStore {
 public:
  using IsPinned = std::function<bool(ExpertId)>;
  PartlyPinnedStore(std::int32_t layers, std::int32_t experts, std::size_t slab_bytes,
                    const IsPinned& is_pinned, OnRead on_read = {})
      : PatternStore(layers, experts, slab_bytes, std::move(on_read)) {
    for (std::int32_t layer = 0; layer < layers; ++layer) {
      for (std::int32_t expert = 0; expert < experts; ++expert) {
        const ExpertId id{layer, expert};
        auto& slab = slabs_.emplace_back();
        if (!is_pinned(id)) continue;
        for (std::size_t i = 0; i < slab_bytes; ++i) slab.push_back(pattern(id, i));
      }
    }
  }
  const std::byte* pinned(ExpertId id) const noexcept override {
    const auto& slab = slabs_[index_of(id, experts())];
    return slab.empty() ? nullptr : slab.data();
  }

 private:
  std::vector<std::vector<std::byte>> slabs_;
};

}  // namespace sida::test

namespace sida {

/// As the GPU's: what is pinned and awaited is only enqueued.
template <>
class SlabLoader<test::StreamedBackend> {
 public:
  using Fence = test::StreamedBackend::Fence;
  static constexpr bool splits_awaited = false;
  static constexpr bool may_only_begin = true;

  explicit SlabLoader(test::StreamedBackend& backend)
      : backend_(backend), stream_(backend.make_stream()) {}
  Fence load(ExpertStore& store, ExpertId id, std::size_t offset, std::size_t bytes,
             std::byte* slab, const Fence& readers, bool is_awaited) {
    if (!only_begins(store, id)) {
      backend_.synchronize(readers);
      store.read(id, offset, {slab + offset, bytes});
      return {};
    }
    backend_.wait(stream_, readers);
    backend_.copy_async(slab + offset, store.pinned(id) + offset, bytes, stream_);
    const Fence arrival = backend_.fence(stream_);
    if (is_awaited) return arrival;
    backend_.synchronize(arrival);
    return {};
  }
  static bool only_begins(const ExpertStore& store, ExpertId id) { return store.pinned(id); }

 private:
  test::StreamedBackend& backend_;
  test::StreamedBackend::Stream stream_;
};

}  // namespace sida
