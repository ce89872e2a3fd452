// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "sida/backend/cpu_backend.hpp"
#include "sida/cache/expert_store.hpp"
#include "sida/core/error.hpp"
#include "sida/ffn/expert_ffn_cpu.hpp"
#include "sida/schedule/slab_loader.hpp"
#include "support/faults.hpp"

namespace sida::test {

/// A CPU backend whose allocations, copies, launches and waits fail as Faults says.
class FaultyBackend : public CpuBackend {
 public:
  void* allocate(std::size_t bytes) {
    if (Faults::strikes(Fault::allocation)) throw OutOfMemory("an allocation that was to fail");
    return CpuBackend::allocate(bytes);
  }
  using CpuBackend::synchronize;
  void synchronize(const Fence&) { strike(Fault::event); }

  static void strike(Fault kind) {
    if (Faults::strikes(kind)) throw CudaError("an operation that was to fail");
  }
};

}  // namespace sida::test

namespace sida {

template <>
class SlabLoader<test::FaultyBackend> {
 public:
  static constexpr bool splits_awaited = SlabLoader<CpuBackend>::splits_awaited;
  static constexpr bool may_only_begin = false;

  explicit SlabLoader(test::FaultyBackend& backend) noexcept
      : backend_(backend), loader_(backend) {}
  CpuBackend::Fence load(ExpertStore& store, ExpertId id, std::size_t offset, std::size_t bytes,
                         std::byte* slab, const CpuBackend::Fence& readers, bool is_awaited) const {
    backend_.strike(test::Fault::copy);
    const auto arrival = loader_.load(store, id, offset, bytes, slab, readers, is_awaited);
    backend_.synchronize(readers);
    return arrival;
  }

 private:
  test::FaultyBackend& backend_;
  SlabLoader<CpuBackend> loader_;
};

template <>
class ExpertFfn<test::FaultyBackend> : public ExpertFfn<CpuBackend> {
 public:
  using ExpertFfn<CpuBackend>::ExpertFfn;
  void compute(std::span<const ExpertTask> tasks) {
    test::FaultyBackend::strike(test::Fault::launch);
    ExpertFfn<CpuBackend>::compute(tasks);
  }
};

}  // namespace sida
