// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "sida/backend/cuda_backend.hpp"
#include "sida/cache/array_store.hpp"
#include "sida/cache/expert_store.hpp"
#include "sida/cache/slab_parts.hpp"
#include "sida/core/error.hpp"

namespace sida {

/// Experts in pinned memory, taken from arrays layer by layer: each layer has memory of its own, so
/// that whoever had it can let it go before the next. For reading once all layers are there.
class PinnedLayers : public ExpertStore {
 public:
  PinnedLayers(const CudaBackend& backend, std::int32_t layers, std::int32_t experts,
               std::size_t slab_bytes, int threads = 4)
      : backend_(backend),
        layers_(layers),
        experts_(experts),
        slab_bytes_(slab_bytes),
        threads_(threads),
        done_(backend_.make_event()) {}

  std::int32_t layers() const noexcept override { return layers_; }
  std::int32_t experts() const noexcept override { return experts_; }
  std::size_t slab_bytes() const noexcept override { return slab_bytes_; }

  /// Takes the next layer; each expert's parts lie in RAM or on a GPU, and are not needed once this
  /// returns. @throws InvalidArgument for another number of experts, a layer too many; OutOfMemory;
  /// CudaError.
  void take(std::span<const std::vector<ArrayPart>> parts) {
    SIDA_EXPECTS(std::ssize(slabs_) < layers_, "PinnedLayers: all layers are there already");
    expect_experts(parts.size());
    PinnedBuffer slabs(backend_, parts.size() * slab_bytes_, threads_);
    for (std::size_t expert = 0; expert < parts.size(); ++expert)
      for (const ArrayPart& part : parts[expert])
        copy(slabs.data() + expert * slab_bytes_ + part.slab_offset, part.data, part.bytes);
    finish();
    slabs_.push_back(std::move(slabs));
  }

  /// Copies a layer to the arrays, in RAM or on a GPU, that `parts` name, and frees its memory.
  /// @throws as take().
  void give_back(std::int32_t layer, std::span<const std::vector<ArrayPart>> parts) {
    check_read(*this, {layer, 0}, 0, 0);
    expect_experts(parts.size());
    PinnedBuffer& slabs = slabs_.at(static_cast<std::size_t>(layer));
    for (std::size_t expert = 0; expert < parts.size(); ++expert)
      for (const ArrayPart& part : parts[expert])
        copy(const_cast<std::byte*>(part.data),
             slabs.data() + expert * slab_bytes_ + part.slab_offset, part.bytes);
    finish();
    slabs = {};
  }

  void read(ExpertId id, std::size_t offset, std::span<std::byte> destination) override {
    check_read(*this, id, offset, destination.size());
    std::memcpy(destination.data(), pinned(id) + offset, destination.size());
  }
  const std::byte* pinned(ExpertId id) const noexcept override {
    return slabs_[static_cast<std::size_t>(id.layer)].data() +
           static_cast<std::size_t>(id.expert) * slab_bytes_;
  }

 private:
  void expect_experts(std::size_t count) const {
    SIDA_EXPECTS(count == static_cast<std::size_t>(experts_),
                 "PinnedLayers: expected " + std::to_string(experts_) + " experts, got " +
                     std::to_string(count));
  }
  void copy(std::byte* to, const std::byte* from, std::size_t bytes) {
    backend_.copy_async(to, from, bytes, stream_);
  }
  void finish() {
    backend_.record(done_, stream_);
    backend_.synchronize(done_);
  }

  CudaBackend backend_;
  std::int32_t layers_, experts_;
  std::size_t slab_bytes_;
  int threads_;
  // The legacy default stream: behind what other libraries, by default, did to the arrays.
  CudaBackend::Stream stream_ = CudaBackend::Stream::borrow(nullptr);
  CudaBackend::Event done_;
  std::vector<PinnedBuffer> slabs_;  // by layer
};

}  // namespace sida
