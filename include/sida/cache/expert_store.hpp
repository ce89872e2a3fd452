// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "sida/core/expert_id.hpp"

namespace sida {

class ReadRing;

/// The slow tier: every expert of a model as a slab of `slab_bytes()` bytes that can be read in
/// ranges. A store knows nothing of what the bytes mean and keeps no expert in memory.
///
/// Thread-safe: several transfer threads read at once.
class ExpertStore {
 public:
  ExpertStore() = default;
  ExpertStore(const ExpertStore&) = delete;
  ExpertStore& operator=(const ExpertStore&) = delete;
  virtual ~ExpertStore() = default;

  virtual std::int32_t layers() const noexcept = 0;
  virtual std::int32_t experts() const noexcept = 0;  ///< in each layer
  virtual std::size_t slab_bytes() const noexcept = 0;

  /// Copies bytes [offset, offset + destination.size()) of the expert's slab to `destination`;
  /// returns when they are there. Bytes between the slab's parts come as zeros.
  /// @throws OutOfRange for an expert or a range outside the store, IoError when reading fails (the
  /// destination's content is then undefined).
  virtual void read(ExpertId id, std::size_t offset, std::span<std::byte> destination) = 0;

  /// The expert's slab where it lies whole in pinned memory, which a GPU copies from; else null.
  /// The id is not checked.
  virtual const std::byte* pinned(ExpertId) const noexcept { return nullptr; }

  /// Pinned memory through which what is not pinned comes to a GPU; null where there is none.
  virtual ReadRing* ring() noexcept { return nullptr; }

  /// Bytes of memory that reading needs beside the destination (a conversion buffer), at most one
  /// slab; counted in a budget that is given in bytes.
  virtual std::size_t staging_bytes() const noexcept { return 0; }
};

}  // namespace sida
