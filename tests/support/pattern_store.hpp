// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <span>
#include <thread>
#include <utility>

#include "sida/cache/expert_store.hpp"
#include "sida/cache/slab_parts.hpp"

namespace sida::test {

/// A store of experts whose every byte follows from the expert and the byte's place. What a read
/// does before that, waiting or throwing, is up to the test.
class PatternStore : public ExpertStore {
 public:
  using OnRead = std::function<void(ExpertId, std::size_t offset)>;

  PatternStore(std::int32_t layers, std::int32_t experts, std::size_t slab_bytes,
               OnRead on_read = {})
      : layers_(layers), experts_(experts), slab_bytes_(slab_bytes), on_read_(std::move(on_read)) {}

  std::int32_t layers() const noexcept override { return layers_; }
  std::int32_t experts() const noexcept override { return experts_; }
  std::size_t slab_bytes() const noexcept override { return slab_bytes_; }

  void read(ExpertId id, std::size_t offset, std::span<std::byte> destination) override {
    check_read(*this, id, offset, destination.size());
    if (on_read_) on_read_(id, offset);
    for (std::size_t i = 0; i < destination.size(); ++i) destination[i] = pattern(id, offset + i);
  }

  static std::byte pattern(ExpertId id, std::size_t place) noexcept {
    const auto mixed = static_cast<std::uint32_t>(id.layer) * 7919u +
                       static_cast<std::uint32_t>(id.expert) * 104729u +
                       static_cast<std::uint32_t>(place) * 31u;
    return static_cast<std::byte>(mixed >> 3);
  }
  /// Whether `slab` is the expert's, byte for byte.
  bool holds(ExpertId id, const std::byte* slab) const noexcept {
    for (std::size_t i = 0; i < slab_bytes_; ++i)
      if (slab[i] != pattern(id, i)) return false;
    return true;
  }

 private:
  std::int32_t layers_, experts_;
  std::size_t slab_bytes_;
  OnRead on_read_;
};

/// Lets threads through once it is opened.
class Gate {
 public:
  void open() {
    const std::lock_guard lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }
  void pass() {
    std::unique_lock lock(mutex_);
    ++waiting_;
    changed_.notify_all();
    changed_.wait(lock, [&] { return open_; });
    --waiting_;
  }
  /// Waits until a thread stands before the gate.
  void wait_for_arrival() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return waiting_ > 0; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool open_ = false;
  int waiting_ = 0;
};

/// Waits until `condition` holds; false if it does not within a minute.
template <class Condition>
bool eventually(Condition&& condition) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::minutes(1);
  while (!condition()) {
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
  return true;
}

}  // namespace sida::test
