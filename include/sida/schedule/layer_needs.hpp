// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <iterator>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sida/cache/expert_cache.hpp"
#include "sida/core/error.hpp"
#include "sida/schedule/transfer_queue.hpp"

namespace sida {

/// The experts that one layer call needs: asked for at once, handed out in waves. It decides and
/// keeps count; Demand waits, Replay imagines the wait.
///
/// All state is guarded by the cache's mutex, which every member expects to be held. To be
/// destroyed without it, since leases end then.
template <class Cache>
class LayerNeeds {
 public:
  using Lease = typename Cache::Lease;
  using Queue = TransferQueue<Cache>;

  LayerNeeds(Cache& cache, Queue& queue, std::int32_t layer)
      : cache_(cache),
        queue_(queue),
        layer_(layer),
        awaited_(std::make_shared<typename Queue::Awaited>()) {}
  LayerNeeds(const LayerNeeds&) = delete;
  LayerNeeds& operator=(const LayerNeeds&) = delete;

  /// Asks, once; who transfers is not yet told. `counted[i]` is 0 where padding alone needs the
  /// expert; empty: all count. Without `is_call` nothing is computed, and nothing learnt from it.
  /// @throws OutOfRange, InvalidArgument, StateError before anything is changed.
  void ask(std::int64_t step, const std::vector<std::int32_t>& experts,
           std::span<const std::uint8_t> counted, bool predicted, bool is_call = true) {
    std::vector<bool> foretold;
    for (const std::int32_t expert : experts) {
      cache_.residency_locked({layer_, expert});  // throws
      foretold.push_back(queue_.prefetches().asked_for({layer_, expert}, step));
    }
    SIDA_EXPECTS(counted.empty() || counted.size() == experts.size(),
                 "demand: expected a flag for each of the " + std::to_string(experts.size()) +
                     " experts, got " + std::to_string(counted.size()));
    if (queue_.calls() > 0) throw StateError("demand: the layer call before has not ended");
    ++queue_.calls();
    try {
      if (is_call) {
        ++stats().calls;
        stats().predicted_calls += predicted;
        stats().look_ahead += queue_.look_ahead().begin_layer({layer_, step}, experts, counted);
        cache_.forecast().begin_layer(layer_, step, experts);
      }
      queue_.begin_layer(layer_, experts);
      for (std::size_t i = 0; i < experts.size(); ++i)
        ask_for({layer_, experts[i]}, foretold[i], counted.empty() || counted[i] != 0);
    } catch (...) {  // for want of memory
      end();
      throw;
    }
  }

  /// Drops what was not handed out.
  void end() {
    --queue_.calls();
    queue_.abandon(awaited_);
    dropped_.swap(awaited_->arrived);  // ends with this, after the lock
  }

  /// What was handed out is computed. Whether there was anything, which may have held others back:
  /// who transfers is not yet told.
  bool begin_wave() {
    if (handed_out_.empty()) return false;
    for (const ExpertId id : handed_out_) cache_.forecast().done(id);
    handed_out_.clear();
    awaited_->backlog -= std::exchange(in_hand_, 0);
    return true;
  }

  /// True if a wave has to wait: something is missing and nothing is there.
  bool must_wait() const {
    return resident_.empty() && awaited_->arrived.empty() && !awaited_->missing.empty();
  }

  /// True if all were handed out.
  bool is_over() const {
    return resident_.empty() && awaited_->arrived.empty() && awaited_->missing.empty();
  }

  /// True once something has arrived, or went wrong, or nothing can come.
  bool is_over_waiting() {
    if (awaited_->error || !awaited_->arrived.empty()) return true;
    if (queue_.is_stuck())
      awaited_->error = std::make_exception_ptr(StateError(
          "next_ready: every slot is leased, so the missing experts can never come; drop the "
          "leases of a wave before asking for the next"));
    return awaited_->error != nullptr;
  }

  /// The wave: empty when all were handed out. Of what was there from the start it is a small group
  /// as long as others wait for its slots. @throws what a load threw.
  std::vector<Lease> take() {
    constexpr std::size_t group = 4;
    rethrow_error();
    // What was waited for comes first, so that more can be loaded.
    std::vector<Lease> ready = take_arrived(awaited_->arrived.size());
    while (!resident_.empty() && (awaited_->missing.empty() || ready.size() < group)) {
      ready.push_back(std::move(resident_.back()));
      resident_.pop_back();
    }
    return hand_out(std::move(ready));
  }

  /// As take(), for computing that is only begun, at a price for each wave, and for loads that only
  /// began: first all that was there from the start; of the others the half that is there soonest,
  /// so that it is computed while the rest is on its way, and its slots are free for more.
  std::vector<Lease> take_begun() {
    constexpr std::size_t few = 8;  // computed as fast as in halves
    rethrow_error();
    if (!resident_.empty()) return hand_out(std::exchange(resident_, {}));
    const std::size_t left = awaited_->arrived.size();
    const bool is_last = awaited_->missing.empty() && left <= few;
    return hand_out(take_arrived(is_last ? left : (left + 1) / 2));
  }

  /// Of the layer.
  LayerStats& stats() { return queue_.stats().layers[static_cast<std::size_t>(layer_)]; }

 private:
  void ask_for(ExpertId id, bool foretold, bool counted) {
    const auto residency = cache_.residency_locked(id);
    stats().uses += counted;
    if (auto lease = cache_.try_lease_locked(id)) {
      stats().hits += counted;
      resident_.push_back(std::move(*lease));
      return;
    }
    const bool late = foretold || residency == Cache::Residency::loading;
    (late ? stats().late : stats().misses) += counted;
    awaited_->missing.push_back(id);
    queue_.demand(id, awaited_);
  }

  void rethrow_error() {
    if (awaited_->error) std::rethrow_exception(std::exchange(awaited_->error, nullptr));
  }
  // The first `count` of what was waited for.
  std::vector<Lease> take_arrived(std::size_t count) {
    auto& arrived = awaited_->arrived;
    const auto end = arrived.begin() + static_cast<std::ptrdiff_t>(count);
    std::vector<Lease> taken(std::move_iterator(arrived.begin()), std::move_iterator(end));
    arrived.erase(arrived.begin(), end);
    in_hand_ = static_cast<std::int64_t>(count);
    return taken;
  }
  std::vector<Lease> hand_out(std::vector<Lease> ready) {
    for (const Lease& lease : ready) handed_out_.push_back(lease.id());
    return ready;
  }

  Cache& cache_;
  Queue& queue_;
  std::int32_t layer_;
  std::vector<Lease> dropped_;
  std::shared_ptr<typename Queue::Awaited> awaited_;
  std::vector<Lease> resident_;
  std::vector<ExpertId> handed_out_;
  std::int64_t in_hand_ = 0;  // of these, the ones that were waited for
};

}  // namespace sida
