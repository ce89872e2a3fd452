// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <span>

#include "sida/core/error.hpp"
#include "support/copied_store.hpp"
#include "support/faults.hpp"

namespace sida::test {

/// A store whose reads fail as Faults says, half done.
class FaultyStore : public CopiedStore {
 public:
  using CopiedStore::CopiedStore;
  void read(ExpertId id, std::size_t offset, std::span<std::byte> destination) override {
    if (Faults::strikes(Fault::read)) {
      CopiedStore::read(id, offset, destination.first(destination.size() / 2));
      throw IoError("a read that was to fail");
    }
    CopiedStore::read(id, offset, destination);
  }
};

}  // namespace sida::test
