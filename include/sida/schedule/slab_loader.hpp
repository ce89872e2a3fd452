// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concepts>
#include <cstddef>

#include "sida/backend/cpu_backend.hpp"
#include "sida/cache/expert_store.hpp"

namespace sida {

/// Brings a range of a slab from the store to a slot of the backend's fast memory, behind what
/// still reads the slot (`readers`). What a layer waits for (`is_awaited`) goes before the rest.
/// Specialised for each backend, called from several threads at once.
///
/// load() returns when the range is there; of a slab that is awaited, where `only_begins(store,
/// id)`, at once: then it is there behind the fence that is returned. Whoever needs such a slab
/// begins its load without a transfer thread.
template <class B>
class SlabLoader;

/// On the CPU the store reads straight into the slot.
template <std::derived_from<CpuBackend> B>
class SlabLoader<B> {
 public:
  static constexpr bool splits_awaited = true;   ///< an awaited slab comes in chunks, as any other
  static constexpr bool may_only_begin = false;  ///< only_begins() is there, and may be true

  explicit SlabLoader(B&) noexcept {}

  /// @throws what the store throws.
  CpuBackend::Fence load(ExpertStore& store, ExpertId id, std::size_t offset, std::size_t bytes,
                         std::byte* slab, const CpuBackend::Fence&, bool) const {
    store.read(id, offset, {slab + offset, bytes});
    return {};
  }
};

}  // namespace sida
