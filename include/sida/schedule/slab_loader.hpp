// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concepts>
#include <cstddef>

#include "sida/backend/cpu_backend.hpp"
#include "sida/cache/expert_store.hpp"

namespace sida {

/// Brings a range of a slab from the store to a slot of the backend's fast memory, behind what
/// still reads the slot (`readers`); returns when it is there. What a layer waits for
/// (`is_awaited`) goes before the rest. Specialised for each backend, called from several transfer
/// threads at once.
template <class B>
class SlabLoader;

/// On the CPU the store reads straight into the slot.
template <std::derived_from<CpuBackend> B>
class SlabLoader<B> {
 public:
  static constexpr bool splits_awaited = true;  ///< an awaited slab comes in chunks, as any other

  explicit SlabLoader(B&) noexcept {}

  /// @throws what the store throws.
  void load(ExpertStore& store, ExpertId id, std::size_t offset, std::size_t bytes, std::byte* slab,
            const CpuBackend::Fence&, bool) const {
    store.read(id, offset, {slab + offset, bytes});
  }
};

}  // namespace sida
