// SPDX-License-Identifier: Apache-2.0
#include "engine.hpp"

#include "sida/backend/cpu_backend.hpp"
#include "sida/ffn/routed_call_cpu.hpp"
#include "sida/hash/hash_predictor_cpu.hpp"
// The backend's headers come first.
#include "engine_of.hpp"

namespace sida::bindings {

std::shared_ptr<AnyCache> make_cpu_cache(const Store& store, const Budget& budget,
                                         const std::string& policy) {
  return with_policy(policy, [&]<EvictionPolicy Policy>(Type<Policy>) -> std::shared_ptr<AnyCache> {
    return std::make_shared<Cache<CpuBackend, Policy>>(CpuBackend(), store, store.store, budget);
  });
}

std::shared_ptr<AnyPredictor> make_cpu_predictor(PredictorWeights weights) {
  return std::make_shared<Predictor<CpuBackend>>(HashPredictor<CpuBackend>(std::move(weights)), -1);
}

ReplayResult replay(const std::string& policy, const HashTable& routing, const HashTable& foretold,
                    const ReplayOptions& options) {
  return with_policy(policy, [&]<EvictionPolicy Policy>(Type<Policy>) {
    return sida::replay<Policy>(routing, foretold, options);
  });
}

}  // namespace sida::bindings
