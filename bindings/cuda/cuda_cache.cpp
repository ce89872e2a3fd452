// SPDX-License-Identifier: Apache-2.0
#include "cuda_cache.hpp"

#include <algorithm>
#include <utility>

#include "sida/backend/cpu_backend.hpp"
#include "sida/cuda.hpp"
// The backend's headers come first.
#include "engine_of.hpp"

namespace sida::bindings {
namespace {

/// A pinned store and the backend that it is pinned for.
struct Pinned {
  Pinned(const CudaBackend& device, std::shared_ptr<ExpertStore> source, std::size_t host_bytes)
      : backend(device), store(backend, std::move(source), host_bytes) {}

  CudaBackend backend;
  PinnedStore store;
};

std::shared_ptr<AnyCache> make_cache(const Store& store, const Budget& budget,
                                     const std::string& policy, const std::string& device,
                                     std::optional<std::size_t> host_bytes) {
  const CudaBackend backend(CudaBackend::device_index(device));
  return with_policy(policy, [&]<EvictionPolicy Policy>(Type<Policy>) -> std::shared_ptr<AnyCache> {
    const auto pinned = std::make_shared<Pinned>(
        backend, store.store, host_bytes.value_or(CpuBackend().available_bytes() / 10 * 9));
    const std::shared_ptr<ExpertStore> slow(pinned, &pinned->store);
    return std::make_shared<Cache<CudaBackend, Policy>>(backend, store, slow, budget);
  });
}

void check(const std::string& device) { CudaBackend backend(CudaBackend::device_index(device)); }

}  // namespace

const CudaPart cuda_part{&make_cache, &check};

}  // namespace sida::bindings
