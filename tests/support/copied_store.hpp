// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>

#include "sida/cache/expert_store.hpp"

namespace sida::test {

/// Reads from arrays as from a file: never used in place.
class CopiedStore : public ExpertStore {
 public:
  explicit CopiedStore(std::shared_ptr<ExpertStore> store) : store_(std::move(store)) {}
  std::int32_t layers() const noexcept override { return store_->layers(); }
  std::int32_t experts() const noexcept override { return store_->experts(); }
  std::size_t slab_bytes() const noexcept override { return store_->slab_bytes(); }
  void read(ExpertId id, std::size_t offset, std::span<std::byte> destination) override {
    store_->read(id, offset, destination);
  }

 private:
  std::shared_ptr<ExpertStore> store_;
};

}  // namespace sida::test
