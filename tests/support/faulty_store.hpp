// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>

#include "sida/cache/expert_store.hpp"
#include "sida/core/error.hpp"
#include "support/faults.hpp"

namespace sida::test {

/// A store whose reads fail as Faults says, half done; never used in place.
class FaultyStore : public ExpertStore {
 public:
  explicit FaultyStore(std::shared_ptr<ExpertStore> store) : store_(std::move(store)) {}
  std::int32_t layers() const noexcept override { return store_->layers(); }
  std::int32_t experts() const noexcept override { return store_->experts(); }
  std::size_t slab_bytes() const noexcept override { return store_->slab_bytes(); }
  void read(ExpertId id, std::size_t offset, std::span<std::byte> destination) override {
    if (Faults::strikes(Fault::read)) {
      store_->read(id, offset, destination.first(destination.size() / 2));
      throw IoError("a read that was to fail");
    }
    store_->read(id, offset, destination);
  }

 private:
  std::shared_ptr<ExpertStore> store_;
};

}  // namespace sida::test
