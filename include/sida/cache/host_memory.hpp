// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <string>

#include "sida/core/error.hpp"

namespace sida {

/// What pinned host memory is used for: experts that stay there, and, where not all do, the ring
/// through which the others are read (see ReadRing).
struct HostMemory {
  static constexpr std::size_t largest_piece = std::size_t{1} << 20;
  static constexpr std::size_t most_pieces = 16;

  std::size_t experts = 0;  ///< that stay
  std::size_t piece_bytes = 0;
  std::size_t pieces = 0;  ///< of the ring; 0 where all experts stay

  std::size_t ring_bytes() const noexcept { return pieces * piece_bytes; }
};

/// Divides `bytes` of host memory for `experts` slabs of `slab_bytes`: all slabs if they fit, else
/// a ring of a quarter, at most 16 MiB, and slabs in the rest; what no slab fills goes to the ring.
/// @throws InvalidArgument where not even one piece of the ring fits.
inline HostMemory divide_host_memory(std::size_t bytes, std::size_t slab_bytes,
                                     std::size_t experts) {
  if (bytes / slab_bytes >= experts) return {experts, 0, 0};
  const std::size_t piece = std::min(slab_bytes, HostMemory::largest_piece);
  SIDA_EXPECTS(bytes >= piece, "host memory: expected " + std::to_string(piece) +
                                   " bytes or more, through which experts are read, got " +
                                   std::to_string(bytes));
  const auto pieces_in = [&](std::size_t room) {
    return std::clamp<std::size_t>(room / piece, 1, HostMemory::most_pieces);
  };
  const std::size_t stay = (bytes - pieces_in(bytes / 4) * piece) / slab_bytes;
  return {stay, piece, pieces_in(bytes - stay * slab_bytes)};
}

}  // namespace sida
