// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

#include "sida/cache/expert_store.hpp"
#include "sida/core/thread.hpp"

namespace sida {

/// Told of the bytes that are there, out of how many.
using FillReport = std::function<void(std::size_t done, std::size_t total)>;

/// Reads the first experts of `source`, in order of layer and expert, to slabs one behind the
/// other: as many as `slabs` has room for. `report` is called on the calling thread alone, the last
/// time with everything there.
/// @throws what the source or `report` throws, ThreadError; all threads have ended then.
inline void fill_slabs(ExpertStore& source, std::span<std::byte> slabs, int threads,
                       const FillReport& report = {}) {
  const std::size_t slab = source.slab_bytes(), count = slabs.size() / slab;
  const auto experts = static_cast<std::size_t>(source.experts());
  std::atomic<std::size_t> next = 0, done = 0;
  std::mutex mutex;
  std::exception_ptr error;
  const auto work = [&](const FillReport& told) {
    for (std::size_t i = next++; i < count; i = next++) {
      try {
        source.read(
            {static_cast<std::int32_t>(i / experts), static_cast<std::int32_t>(i % experts)}, 0,
            slabs.subspan(i * slab, slab));
        ++done;
        if (told) told(done * slab, count * slab);
      } catch (...) {
        const std::lock_guard lock(mutex);
        error = std::current_exception();
        next = count;
      }
    }
  };
  {
    std::vector<std::jthread> others;
    try {
      for (int lane = 1; lane < threads; ++lane)
        others.push_back(start_thread<std::jthread>("that reads experts", work, FillReport()));
    } catch (...) {
      next = count;  // lets those that have begun end
      throw;
    }
    work(report);
  }
  if (error) std::rethrow_exception(error);
  if (report) report(count * slab, count * slab);
}

}  // namespace sida
