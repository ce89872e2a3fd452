// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "sida/backend/cpu_backend.hpp"
#include "sida/cache/read_ring.hpp"
#include "sida/ffn/expert_ffn_cpu.hpp"
#include "sida/schedule/slab_loader.hpp"
#include "support/copied_store.hpp"

namespace sida::test {

/// A CPU backend whose loads pass through the store's ring, as those of a GPU do.
class RingedBackend : public CpuBackend {};

/// A store with a ring of `pieces` pieces, each a third of a slab.
class RingedStore : public CopiedStore {
 public:
  RingedStore(std::shared_ptr<ExpertStore> store, std::size_t pieces)
      : CopiedStore(std::move(store)),
        piece_bytes_(slab_bytes() / 3 + 1),
        memory_(pieces * piece_bytes_),
        ring_(*this, memory_, piece_bytes_) {}
  ReadRing* ring() noexcept override { return &ring_; }

 private:
  std::size_t piece_bytes_;
  std::vector<std::byte> memory_;
  ReadRing ring_;
};

}  // namespace sida::test

namespace sida {

template <>
class SlabLoader<test::RingedBackend> {
 public:
  static constexpr bool splits_awaited = false;
  static constexpr bool may_only_begin = false;

  explicit SlabLoader(test::RingedBackend&) noexcept {}
  CpuBackend::Fence load(ExpertStore& store, ExpertId id, std::size_t offset, std::size_t bytes,
                         std::byte* slab, const CpuBackend::Fence&, bool) const {
    ReadRing::Reading reading(*store.ring(), id, offset, bytes);
    std::byte* to = slab + offset;
    for (auto piece = reading.next(); !piece.empty(); piece = reading.next())
      to = std::copy(piece.begin(), piece.end(), to);
    return {};
  }
};

template <>
class ExpertFfn<test::RingedBackend> : public ExpertFfn<CpuBackend> {
 public:
  using ExpertFfn<CpuBackend>::ExpertFfn;
};

}  // namespace sida
