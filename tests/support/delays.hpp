// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <span>
#include <thread>
#include <utility>

#include "sida/backend/cpu_backend.hpp"
#include "sida/cache/expert_store.hpp"
#include "sida/cache/look_ahead_policy.hpp"
#include "sida/ffn/expert_ffn_cpu.hpp"
#include "sida/schedule/slab_loader.hpp"

namespace sida::test {

/// Delays that a seed decides, each thread's by the order in which threads first come here.
class Delays {
 public:
  static void begin(std::uint32_t seed) {
    threads_ = 0;
    seed_ = seed;
  }

  /// Mostly goes on, sometimes lets others go first, sometimes sleeps for up to 100 µs.
  static void here() {
    thread_local std::uint32_t seed = ~0u;
    thread_local std::mt19937 random;
    if (seed != seed_) {
      seed = seed_;
      random.seed(seed * 64 + threads_++);
    }
    const std::uint32_t draw = static_cast<std::uint32_t>(random());
    if (draw % 8 < 5) return;
    if (draw % 8 < 7) return std::this_thread::yield();
    std::this_thread::sleep_for(std::chrono::microseconds(draw / 8 % 100));
  }

 private:
  inline static std::atomic<std::uint32_t> seed_ = 0, threads_ = 0;
};

/// Delayed under the cache's lock, where an expert becomes resident, is leased and is evicted, and
/// where a demand or a prefetch takes a slot.
class DelayedPolicy : public LookAheadPolicy {
 public:
  void inserted(ExpertId) { Delays::here(); }
  void used(ExpertId) { Delays::here(); }
  void evicted(ExpertId) { Delays::here(); }
  std::size_t victim(std::span<const ExpertId> candidates, const UseForecast& forecast) const {
    Delays::here();
    return LookAheadPolicy::victim(candidates, forecast);
  }
};

/// Delayed around every chunk of a transfer, and where leased experts are computed.
class DelayedBackend : public CpuBackend {};

}  // namespace sida::test

namespace sida {

template <>
class SlabLoader<test::DelayedBackend> {
 public:
  static constexpr bool splits_awaited = SlabLoader<CpuBackend>::splits_awaited;
  static constexpr bool may_only_begin = false;

  explicit SlabLoader(test::DelayedBackend& backend) noexcept : loader_(backend) {}
  CpuBackend::Fence load(ExpertStore& store, ExpertId id, std::size_t offset, std::size_t bytes,
                         std::byte* slab, const CpuBackend::Fence& readers, bool is_awaited) const {
    test::Delays::here();
    const auto arrival = loader_.load(store, id, offset, bytes, slab, readers, is_awaited);
    test::Delays::here();
    return arrival;
  }

 private:
  SlabLoader<CpuBackend> loader_;
};

template <>
class ExpertFfn<test::DelayedBackend> : public ExpertFfn<CpuBackend> {
 public:
  using ExpertFfn<CpuBackend>::ExpertFfn;
  void begin(const ConstTensorView& hidden, const TokenGroups& groups) {
    ExpertFfn<CpuBackend>::begin(hidden, groups);
    test::Delays::here();  // before the demand is made
  }
  void compute(std::span<const ExpertTask> tasks) {
    test::Delays::here();  // experts were leased
    ExpertFfn<CpuBackend>::compute(tasks);
    test::Delays::here();  // before they are given back
  }
};

}  // namespace sida
