// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <set>
#include <span>
#include <string>
#include <thread>
#include <utility>

#include "sida/cache/expert_store.hpp"
#include "sida/core/error.hpp"

namespace sida {

/// Another store behind a link of stated bandwidth and latency, for tests and benchmarks. Each read
/// first waits for the latency, then its bytes cross the link, which reads under way at the same
/// time share equally: n of them get bytes_per_second / n each. A read that the store behind takes
/// longer for takes that long.
class ThrottledStore : public ExpertStore {
 public:
  /// `bytes_per_second` is 1 or more (infinity: latency only), `latency_seconds` 0 to 60.
  /// @throws InvalidArgument.
  ThrottledStore(std::shared_ptr<ExpertStore> store, double bytes_per_second,
                 double latency_seconds = 0)
      : store_(std::move(store)), bytes_per_second_(bytes_per_second), latency_(latency_seconds) {
    SIDA_EXPECTS(store_ != nullptr, "ThrottledStore: expected a store, got none");
    SIDA_EXPECTS(bytes_per_second >= 1, "ThrottledStore: expected bytes_per_second >= 1, got " +
                                            std::to_string(bytes_per_second));
    SIDA_EXPECTS(latency_seconds >= 0 && latency_seconds <= 60,
                 "ThrottledStore: expected latency_seconds from 0 to 60, got " +
                     std::to_string(latency_seconds));
  }

  std::int32_t layers() const noexcept override { return store_->layers(); }
  std::int32_t experts() const noexcept override { return store_->experts(); }
  std::size_t slab_bytes() const noexcept override { return store_->slab_bytes(); }
  std::size_t staging_bytes() const noexcept override { return store_->staging_bytes(); }

  void read(ExpertId id, std::size_t offset, std::span<std::byte> destination) override {
    if (latency_.count() > 0) std::this_thread::sleep_for(latency_);
    Crossing crossing(*this, destination.size());
    store_->read(id, offset, destination);
    crossing.wait();
  }

 private:
  using Clock = std::chrono::steady_clock;
  using Seconds = std::chrono::duration<double>;

  /// One read's share of the link, given up when it goes, by an exception too.
  ///
  /// The link is simulated by the bytes that every read under way has been given so far
  /// (`served_`): a read that came at s and has n bytes is across when served_ reaches s + n, and
  /// served_ grows by bytes_per_second / reads under way.
  class Crossing {
   public:
    Crossing(ThrottledStore& link, std::size_t bytes) : link_(link) {
      const std::lock_guard lock(link_.mutex_);
      link_.advance(Clock::now());
      goal_ = link_.served_ + static_cast<double>(bytes);
      link_.goals_.insert(goal_);
      link_.changed_.notify_all();
    }
    Crossing(const Crossing&) = delete;
    Crossing& operator=(const Crossing&) = delete;
    ~Crossing() {
      const std::lock_guard lock(link_.mutex_);
      link_.advance(Clock::now());
      if (link_.served_ < goal_) link_.goals_.erase(link_.goals_.find(goal_));
      link_.changed_.notify_all();
    }

    void wait() {
      std::unique_lock lock(link_.mutex_);
      for (link_.advance(Clock::now()); link_.served_ < goal_; link_.advance(Clock::now())) {
        const Seconds rest{(goal_ - link_.served_) * static_cast<double>(link_.goals_.size()) /
                           link_.bytes_per_second_};
        link_.changed_.wait_for(lock, std::min(rest, Seconds{60}));
      }
    }

   private:
    ThrottledStore& link_;
    double goal_ = 0;
  };

  /// Brings `served_` up to `now`, read by read: the share grows when one is across.
  void advance(Clock::time_point now) {
    Seconds elapsed = now - time_;
    time_ = now;
    while (!goals_.empty()) {
      const double share = bytes_per_second_ / static_cast<double>(goals_.size());
      const Seconds next{(*goals_.begin() - served_) / share};
      if (next > elapsed) {
        served_ += elapsed.count() * share;
        return;
      }
      elapsed -= next;
      served_ = std::max(served_, *goals_.begin());
      goals_.erase(goals_.begin());
    }
  }

  std::shared_ptr<ExpertStore> store_;
  double bytes_per_second_;
  Seconds latency_;
  std::mutex mutex_;
  std::condition_variable changed_;
  Clock::time_point time_ = Clock::now();
  double served_ = 0;
  std::multiset<double> goals_;  ///< of the reads under way
};

}  // namespace sida
