// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <optional>

#include "ring_parts.hpp"
#include "sida/backend/cuda_backend.hpp"

namespace sida::cuda {

/// Parts of one block of pinned memory, given back in the order in which they were taken. Pinning
/// takes as long as a layer's call, so that it is done for several parts at once.
class PinnedParts {
 public:
  explicit PinnedParts(CudaBackend& backend) : backend_(backend) {}

  /// A part of so many bytes. `release_first` waits until the part that was taken first is no
  /// longer read or written, and gives it back; it is called until there is room, and until none is
  /// in use where more must be pinned.
  /// @throws CudaError, OutOfMemory, what `release_first` throws.
  template <class Release>
  std::byte* take(std::size_t bytes, Release&& release_first) {
    bytes = std::max(bytes, RingParts::alignment);
    if (ring_.bytes() < fewest * bytes) {
      while (!ring_.is_free()) release_first();
      memory_ = {};
      ring_ = {};
      memory_ = PinnedBuffer(backend_, std::max(2 * fewest * bytes, least_bytes));
      ring_ = RingParts(memory_.size());
    }
    std::optional<std::size_t> begin;
    while (!(begin = ring_.take(bytes))) release_first();
    return memory_.data() + *begin;
  }

  void give_back_first() { ring_.give_back_first(); }
  void give_back_last() { ring_.give_back_last(); }

 private:
  // Memory is for so many parts of the largest size at least, and for small ones so much.
  static constexpr std::size_t fewest = 4, least_bytes = 1 << 16;

  CudaBackend& backend_;
  PinnedBuffer memory_;
  RingParts ring_;
};

}  // namespace sida::cuda
