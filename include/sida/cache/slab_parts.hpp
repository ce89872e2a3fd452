// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <span>
#include <string>

#include "sida/cache/expert_store.hpp"
#include "sida/core/error.hpp"
#include "sida/core/expert_id.hpp"

namespace sida {

// What stores have in common whose slabs are put together from parts.

/// @throws OutOfRange unless `store` has the expert and its slab the bytes
/// [offset, offset + bytes).
inline void check_read(const ExpertStore& store, ExpertId id, std::size_t offset,
                       std::size_t bytes) {
  if (id.layer < 0 || id.layer >= store.layers() || id.expert < 0 || id.expert >= store.experts())
    throw OutOfRange("expected an expert of " + std::to_string(store.layers()) + " layers of " +
                     std::to_string(store.experts()) + ", got layer " + std::to_string(id.layer) +
                     ", expert " + std::to_string(id.expert));
  if (offset > store.slab_bytes() || bytes > store.slab_bytes() - offset)
    throw OutOfRange("expected a range of a slab of " + std::to_string(store.slab_bytes()) +
                     " bytes, got " + std::to_string(bytes) + " bytes at " +
                     std::to_string(offset));
}

/// Fills `destination` with the slab's bytes from `offset` on: calls
/// `read(part, offset in the part, bytes to fill)` for each part that the range touches and writes
/// zeros between parts. `parts` stand in rising order of `slab_offset` and do not overlap; each has
/// `slab_offset` and `bytes`.
template <class Part, class Read>
void read_parts(std::span<const Part> parts, std::size_t offset, std::span<std::byte> destination,
                Read&& read) {
  const std::size_t end = offset + destination.size();
  std::size_t position = offset;
  const auto zeros_until = [&](std::size_t until) {
    if (until > position)
      std::memset(destination.data() + (position - offset), 0, until - position);
  };
  for (const Part& part : parts) {
    const std::size_t begin = std::max(position, part.slab_offset);
    const std::size_t stop = std::min(end, part.slab_offset + part.bytes);
    if (begin >= stop) continue;
    zeros_until(begin);
    read(part, begin - part.slab_offset, destination.subspan(begin - offset, stop - begin));
    position = stop;
  }
  zeros_until(end);
}

}  // namespace sida
