// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "pinned_parts.hpp"
#include "routing_memory.hpp"
#include "sida/backend/cuda_backend.hpp"
#include "sida/core/error.hpp"
#include "sida/ffn/routed_call.hpp"

namespace sida::cuda {

/// The routing of the latest calls in pinned memory, which the GPU writes; each call is accounted
/// for when its routing is there. Thread-safe; begin(), commit() and drop() are for one caller at a
/// time.
class RoutingLog {
 public:
  /// A call's place in the log.
  class Entry {
   public:
    const RoutingMemory& memory() const { return memory_; }
    /// To be read when the GPU has written it.
    RoutedTokens routed() const { return memory_.routed(mask_); }
    /// Behind all of the call's work.
    CudaBackend::Event& done() { return done_; }

   private:
    friend RoutingLog;
    RoutingMemory memory_;
    CudaBackend::Event done_;
    std::vector<std::uint8_t> mask_;
    Account account_;
    bool is_pending_ = false;
  };

  RoutingLog(CudaBackend& backend, std::int32_t experts)
      : backend_(backend), experts_(experts), memory_(backend) {}
  RoutingLog(const RoutingLog&) = delete;
  RoutingLog& operator=(const RoutingLog&) = delete;
  ~RoutingLog() {
    try {
      const std::lock_guard lock(mutex_);
      for (Entry& entry : entries_)
        if (entry.is_pending_) backend_.synchronize(entry.done_);
    } catch (const CudaError&) {  // nothing more to wait for
    }
  }

  /// Accounts for what is there, and gives the next call its place.
  /// @throws OutOfRange for an earlier call's id, CudaError, OutOfMemory.
  Entry& begin(std::int64_t tokens, std::int32_t top_k, std::span<const std::uint8_t> mask,
               Account account) {
    const std::lock_guard lock(mutex_);
    while (entries_[oldest_].is_pending_ && backend_.is_complete(entries_[oldest_].done_))
      settle_oldest();
    if (entries_[next_].is_pending_) wait_for_oldest();  // all are: the oldest is the next
    Entry& entry = entries_[next_];
    entry.mask_.assign(mask.begin(), mask.end());
    entry.account_ = std::move(account);
    if (!entry.done_.native()) entry.done_ = backend_.make_event();
    if (std::exchange(is_begun_, false)) memory_.give_back_last();  // of a call without end
    entry.memory_ = {
        memory_.take(RoutingMemory::bytes(tokens, top_k), [this] { wait_for_oldest(); }), tokens,
        top_k};
    is_begun_ = true;
    return entry;
  }

  /// All of the work of the call that begin() was for is enqueued. One that is `dropped` is not
  /// accounted for.
  void commit(CudaBackend::Stream& stream, bool dropped) {
    const std::lock_guard lock(mutex_);
    Entry& entry = entries_[next_];
    try {
      backend_.record(entry.done_, stream);
    } catch (...) {  // the place is used again, by the next call
      backend_.finish(stream);
      throw;
    }
    if (dropped) entry.account_ = nullptr;
    entry.is_pending_ = true;
    is_begun_ = false;
    next_ = (next_ + 1) % entries_.size();
  }

  /// Waits for all calls that were committed, and accounts for them. @throws as begin().
  void settle() {
    const std::lock_guard lock(mutex_);
    while (entries_[oldest_].is_pending_) wait_for_oldest();
  }

  /// @throws OutOfRange naming the first id that is no expert's.
  void expect_experts(const Entry& entry) const { entry.memory_.expect_experts(experts_); }

 private:
  void wait_for_oldest() {
    backend_.synchronize(entries_[oldest_].done_);
    settle_oldest();
  }
  void settle_oldest() {
    Entry& entry = entries_[oldest_];
    oldest_ = (oldest_ + 1) % entries_.size();
    entry.is_pending_ = false;
    memory_.give_back_first();  // nothing takes it before the account has read it
    const Account account = std::exchange(entry.account_, nullptr);
    if (account) account(entry.memory_.accounted(experts_, entry.mask_));
  }

  CudaBackend& backend_;
  std::int32_t experts_;
  std::mutex mutex_;
  PinnedParts memory_;
  std::array<Entry, 32> entries_;
  std::size_t next_ = 0, oldest_ = 0;
  bool is_begun_ = false;  // the next entry has memory, and was not committed
};

}  // namespace sida::cuda
