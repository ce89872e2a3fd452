// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <limits>
#include <mutex>
#include <tuple>

#include "sida/backend/cpu_backend.hpp"
#include "sida/cache/fifo_policy.hpp"
#include "sida/cache/lfu_policy.hpp"
#include "sida/cache/look_ahead_policy.hpp"
#include "sida/cache/lru_policy.hpp"

namespace sida::test {

/// A backend and a policy: what a contract test is instantiated for.
template <Backend B, EvictionPolicy P>
struct Engine {
  using backend = B;
  using policy = P;
};

/// Every backend with every policy, for TEMPLATE_LIST_TEST_CASE.
using Engines = std::tuple<Engine<CpuBackend, FifoPolicy>, Engine<CpuBackend, LruPolicy>,
                           Engine<CpuBackend, LfuPolicy>, Engine<CpuBackend, LookAheadPolicy>>;

/// A CPU backend that counts what is allocated and can be short of memory.
class CountingBackend : public CpuBackend {
 public:
  void* allocate(std::size_t bytes) {
    void* const data = CpuBackend::allocate(bytes);
    const std::lock_guard lock(mutex_);
    allocated_ += bytes;
    peak_ = std::max(peak_, allocated_);
    return data;
  }
  void deallocate(void* data, std::size_t bytes) noexcept {
    CpuBackend::deallocate(data, bytes);
    const std::lock_guard lock(mutex_);
    allocated_ -= bytes;
  }
  std::size_t available_bytes() const noexcept { return available; }

  std::size_t allocated() const {
    const std::lock_guard lock(mutex_);
    return allocated_;
  }
  /// The most that was allocated at once.
  std::size_t peak() const {
    const std::lock_guard lock(mutex_);
    return peak_;
  }

  std::size_t available = std::numeric_limits<std::size_t>::max();

 private:
  mutable std::mutex mutex_;
  std::size_t allocated_ = 0, peak_ = 0;
};

}  // namespace sida::test
