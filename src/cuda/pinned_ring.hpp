// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <utility>

#include "sida/backend/cuda_backend.hpp"

namespace sida::cuda {

/// Pinned memory that small copies to the GPU are sent from, such that the host need not wait for
/// one copy before it prepares the next.
class PinnedRing {
 public:
  explicit PinnedRing(CudaBackend& backend) : backend_(backend) {}
  PinnedRing(const PinnedRing&) = delete;
  PinnedRing& operator=(const PinnedRing&) = delete;
  ~PinnedRing() {
    try {
      for (Place& place : places_) wait(place);
    } catch (const CudaError&) {  // nothing more to wait for
    }
  }

  /// Memory to fill: waits for the copy that was sent from it last.
  std::byte* next(std::size_t bytes) {
    Place& place = places_[at_];
    wait(place);
    if (place.memory.size() < bytes) {
      place.memory = {};
      place.memory = PinnedBuffer(backend_, std::max<std::size_t>(bytes, 4096));
    }
    return place.memory.data();
  }
  /// Sends what lies in the memory that next() gave.
  void send(void* to, std::size_t bytes, CudaBackend::Stream& stream) {
    Place& place = places_[at_];
    if (!place.sent.native()) place.sent = backend_.make_event();
    backend_.copy_async(to, place.memory.data(), bytes, stream);
    try {
      backend_.record(place.sent, stream);
    } catch (...) {  // the place is used again, by the next copy
      backend_.finish(stream);
      throw;
    }
    place.is_sent = true;
    at_ = (at_ + 1) % places_.size();
  }

 private:
  struct Place {
    PinnedBuffer memory;
    CudaBackend::Event sent;
    bool is_sent = false;
  };

  void wait(Place& place) {
    if (std::exchange(place.is_sent, false)) backend_.synchronize(place.sent);
  }

  CudaBackend& backend_;
  std::array<Place, 32> places_;
  std::size_t at_ = 0;
};

}  // namespace sida::cuda
