// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstddef>
#include <utility>

#include "pinned_parts.hpp"
#include "sida/backend/cuda_backend.hpp"

namespace sida::cuda {

/// Pinned memory that small copies to the GPU are sent from, such that the host need not wait for
/// one copy before it prepares the next.
class PinnedRing {
 public:
  explicit PinnedRing(CudaBackend& backend) : backend_(backend), memory_(backend) {}
  PinnedRing(const PinnedRing&) = delete;
  PinnedRing& operator=(const PinnedRing&) = delete;
  ~PinnedRing() {
    try {
      while (places_[oldest_].is_sent) wait_for_oldest();
    } catch (const CudaError&) {  // nothing more to wait for
    }
  }

  /// Memory to fill: waits for copies that were sent before where there is no room beside them.
  std::byte* next(std::size_t bytes) {
    if (places_[next_].is_sent) wait_for_oldest();                // all are: the oldest is the next
    if (std::exchange(from_, nullptr)) memory_.give_back_last();  // which was not sent
    return from_ = memory_.take(bytes, [this] { wait_for_oldest(); });
  }
  /// Sends what lies in the memory that next() gave.
  void send(void* to, std::size_t bytes, CudaBackend::Stream& stream) {
    Place& place = places_[next_];
    if (!place.sent.native()) place.sent = backend_.make_event();
    backend_.copy_async(to, from_, bytes, stream);
    try {
      backend_.record(place.sent, stream);
    } catch (...) {  // the memory is used again, by the next copy
      backend_.finish(stream);
      throw;
    }
    from_ = nullptr;
    place.is_sent = true;
    next_ = (next_ + 1) % places_.size();
  }

 private:
  struct Place {
    CudaBackend::Event sent;
    bool is_sent = false;
  };

  void wait_for_oldest() {
    Place& place = places_[oldest_];
    backend_.synchronize(place.sent);
    place.is_sent = false;
    oldest_ = (oldest_ + 1) % places_.size();
    memory_.give_back_first();
  }

  CudaBackend& backend_;
  PinnedParts memory_;
  std::array<Place, 32> places_;
  std::size_t next_ = 0, oldest_ = 0;
  std::byte* from_ = nullptr;  // what next() gave, not sent yet
};

}  // namespace sida::cuda
