// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sida/cache/expert_store.hpp"
#include "sida/cache/slab_parts.hpp"
#include "sida/core/error.hpp"
#include "sida/core/expert_id.hpp"

namespace sida {

/// A piece of memory that makes up bytes [slab_offset, slab_offset + bytes) of a slab.
struct ArrayPart {
  std::size_t slab_offset = 0;
  const std::byte* data = nullptr;
  std::size_t bytes = 0;
};

/// Experts in arrays that the caller handed over: read where they lie, never copied as a whole.
class ArrayStore : public ExpertStore {
 public:
  /// `parts[layer * experts + expert]` are that expert's, in rising order of slab_offset. `owner`
  /// keeps their memory alive as long as the store; who passes none does so otherwise.
  /// @throws InvalidArgument if parts are missing, overlap, or leave the slab.
  ArrayStore(std::int32_t layers, std::int32_t experts, std::size_t slab_bytes,
             std::vector<std::vector<ArrayPart>> parts, std::shared_ptr<const void> owner = {})
      : layers_(layers),
        experts_(experts),
        slab_bytes_(slab_bytes),
        parts_(std::move(parts)),
        owner_(std::move(owner)) {
    SIDA_EXPECTS(layers > 0 && experts > 0 && slab_bytes > 0,
                 "ArrayStore: expected layers, experts and slab_bytes > 0, got " +
                     std::to_string(layers) + ", " + std::to_string(experts) + ", " +
                     std::to_string(slab_bytes));
    const auto total = static_cast<std::size_t>(layers) * static_cast<std::size_t>(experts);
    SIDA_EXPECTS(parts_.size() == total, "ArrayStore: expected the parts of " +
                                             std::to_string(total) + " experts, got " +
                                             std::to_string(parts_.size()));
    for (const std::vector<ArrayPart>& expert : parts_) {
      std::size_t end = 0;
      for (const ArrayPart& part : expert) {
        SIDA_EXPECTS(part.data != nullptr, "ArrayStore: expected memory, got a null pointer");
        SIDA_EXPECTS(part.slab_offset >= end && part.slab_offset <= slab_bytes &&
                         part.bytes <= slab_bytes - part.slab_offset,
                     "ArrayStore: expected parts in rising order, apart from each other, in " +
                         std::to_string(slab_bytes) + " bytes; got " + std::to_string(part.bytes) +
                         " bytes at " + std::to_string(part.slab_offset));
        end = part.slab_offset + part.bytes;
      }
    }
  }

  std::int32_t layers() const noexcept override { return layers_; }
  std::int32_t experts() const noexcept override { return experts_; }
  std::size_t slab_bytes() const noexcept override { return slab_bytes_; }

  void read(ExpertId id, std::size_t offset, std::span<std::byte> destination) override {
    check_read(*this, id, offset, destination.size());
    read_parts(parts(id), offset, destination,
               [](const ArrayPart& part, std::size_t begin, std::span<std::byte> bytes) {
                 std::memcpy(bytes.data(), part.data + begin, bytes.size());
               });
  }

  /// The expert's parts, for use in place; valid as long as the store. The id is not checked.
  std::span<const ArrayPart> parts(ExpertId id) const noexcept {
    return parts_[index_of(id, experts_)];
  }

 private:
  std::int32_t layers_, experts_;
  std::size_t slab_bytes_;
  std::vector<std::vector<ArrayPart>> parts_;
  std::shared_ptr<const void> owner_;
};

}  // namespace sida
