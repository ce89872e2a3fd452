// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <mutex>
#include <span>
#include <utility>
#include <vector>

#include "relaxed_capture.hpp"
#include "routing_memory.hpp"
#include "sida/backend/cuda_backend.hpp"
#include "sida/ffn/routed_call.hpp"

namespace sida::cuda {

/// The calls that CUDA graphs hold: each has a place of its own in pinned memory, to which every
/// replay writes its routing. Places are kept, since nobody tells when a graph is gone. Between
/// begin() and end() each of them is replayed once at most. Thread-safe.
class GraphCalls {
 public:
  /// Where a call's routing comes to lie.
  class Place {
   public:
    RoutingMemory memory() const { return memory_in(pinned_.data()); }

   private:
    friend GraphCalls;
    RoutingMemory memory_in(std::byte* bytes) const { return {bytes, tokens_, top_k_}; }

    PinnedBuffer pinned_;
    std::int64_t tokens_ = 0;
    std::int32_t top_k_ = 1;
    ReplayAccount account_;
  };

  GraphCalls(CudaBackend& backend, std::int32_t experts) : backend_(backend), experts_(experts) {}
  GraphCalls(const GraphCalls&) = delete;
  GraphCalls& operator=(const GraphCalls&) = delete;
  ~GraphCalls() {
    try {
      if (is_pending_) backend_.synchronize(ended_);
    } catch (const CudaError&) {  // nothing more to wait for
    }
  }

  /// A place for a call of one token or more, while a graph is being captured.
  /// @throws OutOfMemory, CudaError.
  const Place& add(std::int64_t tokens, std::int32_t top_k, ReplayAccount account) {
    const std::lock_guard lock(mutex_);
    const RelaxedCapture relaxed;
    Place place;
    place.tokens_ = tokens;
    place.top_k_ = top_k;
    place.pinned_ = PinnedBuffer(backend_, RoutingMemory::bytes(tokens, top_k));
    place.account_ = std::move(account);
    mark_untouched(place);
    return places_.emplace_back(std::move(place));
  }

  /// From here on places are written anew: waits for the replays before the latest end(), and takes
  /// over what they wrote. @throws OutOfRange for an id in one of them, CudaError.
  void begin() {
    const std::lock_guard lock(mutex_);
    take_over();
    raise_failure();
  }

  /// The replays of `pass` are enqueued on `stream`. Accounts for those before.
  /// @throws CudaError.
  void end(CudaBackend::Stream& stream, std::int64_t pass, std::span<const std::uint8_t> mask) {
    const std::lock_guard lock(mutex_);
    take_over();
    account();
    if (places_.empty()) return;
    if (!ended_.native()) ended_ = backend_.make_event();
    backend_.record(ended_, stream);
    pass_ = pass;
    mask_.assign(mask.begin(), mask.end());
    is_pending_ = true;
  }

  /// Behind the replays before the latest end(); null before the first.
  CudaBackend::Event* ended() { return ended_.native() ? &ended_ : nullptr; }

  /// Accounts for all replays before the latest end(). @throws as begin().
  void settle() {
    const std::lock_guard lock(mutex_);
    take_over();
    account();
    raise_failure();
  }

 private:
  /// What a replay wrote.
  struct Written {
    const Place* place;
    std::vector<std::byte> routing;
  };

  // No weight of a model's: a NaN that no conversion gives.
  static constexpr std::uint32_t untouched = 0x7fa5a5a5;
  static void mark_untouched(Place& place) {
    place.memory().weights()[0] = std::bit_cast<float>(untouched);
  }
  static bool is_untouched(const Place& place) {
    return std::bit_cast<std::uint32_t>(place.memory().weights()[0]) == untouched;
  }

  void take_over() {
    if (!is_pending_) return;
    backend_.synchronize(ended_);
    is_pending_ = false;
    for (Place& place : places_) {
      if (is_untouched(place)) continue;
      const std::byte* const from = place.pinned_.data();
      written_.push_back({&place, {from, from + place.memory().bytes()}});
      mark_untouched(place);
    }
  }
  void account() {
    for (Written& written : std::exchange(written_, {})) {
      const Place& place = *written.place;
      try {
        const bool fits = std::ssize(mask_) == place.tokens_;
        const auto mask =
            fits ? std::span<const std::uint8_t>(mask_) : std::span<const std::uint8_t>();
        place.account_(place.memory_in(written.routing.data()).accounted(experts_, mask), pass_);
      } catch (...) {  // one wrong id leaves the others' counts right
        if (!failure_) failure_ = std::current_exception();
      }
    }
  }
  void raise_failure() {
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
  }

  CudaBackend& backend_;
  std::int32_t experts_;
  std::mutex mutex_;
  std::deque<Place> places_;
  CudaBackend::Event ended_;
  bool is_pending_ = false;  // whether a pass has ended that was not taken over
  std::int64_t pass_ = -1;   // the latest that ended
  std::vector<std::uint8_t> mask_;
  std::vector<Written> written_;  // by that pass, not accounted for
  std::exception_ptr failure_;
};

}  // namespace sida::cuda
