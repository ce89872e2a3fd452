// SPDX-License-Identifier: Apache-2.0
#include "cuda_cache.hpp"

#include <utility>

#include "sida/core/available_memory.hpp"
#include "sida/cuda.hpp"
#include "sida/ffn/slab_layout.hpp"
// The backend's headers come first.
#include "engine_of.hpp"
#include "kernel_tables.hpp"

namespace sida::bindings {
namespace {

/// A pinned store and the backend that it is pinned for.
struct Pinned {
  Pinned(const CudaBackend& device, std::shared_ptr<ExpertStore> source, std::size_t host_bytes,
         const FillReport& report)
      : backend(device), store(backend, std::move(source), host_bytes, report) {}

  CudaBackend backend;
  PinnedStore store;
};

/// Layers of experts, and what their slabs mean.
class PinnedModel : public AnyPinnedLayers {
 public:
  PinnedModel(const CudaBackend& backend, const MoeConfig& config)
      : layers_(std::make_shared<PinnedLayers>(backend, config.layers, config.experts,
                                               SlabLayout(config).slab_bytes)) {
    store_ = {layers_, config, {}, "arrays", bytes_of_slabs(config)};
    for (std::int32_t layer = 0; layer < config.layers; ++layer)
      store_.layer_names.push_back("layer" + std::to_string(layer));
  }

  const Store& store() const override { return store_; }
  void take(std::span<const std::vector<ArrayPart>> parts) override { layers_->take(parts); }
  void give_back(std::int32_t layer, std::span<const std::vector<ArrayPart>> parts) override {
    layers_->give_back(layer, parts);
  }

 private:
  std::shared_ptr<PinnedLayers> layers_;
  Store store_;
};

std::shared_ptr<AnyPinnedLayers> pin_layers(const MoeConfig& config, const std::string& device) {
  return std::make_shared<PinnedModel>(open_gpu(device), config);
}

// The experts where a GPU copies from: in pinned memory, unless they lie there already.
std::shared_ptr<ExpertStore> pinned(const CudaBackend& backend,
                                    const std::shared_ptr<ExpertStore>& source,
                                    std::optional<std::size_t> host_bytes,
                                    const FillReport& report) {
  if (std::dynamic_pointer_cast<PinnedLayers>(source)) return source;
  const auto made = std::make_shared<Pinned>(
      backend, source, host_bytes.value_or(available_memory() / 10 * 9), report);
  return {made, &made->store};
}

std::shared_ptr<AnyCache> make_cache(const Store& store, const Budget& budget,
                                     const std::string& policy, const std::string& device,
                                     std::optional<std::size_t> host_bytes,
                                     const FillReport& report) {
  const CudaBackend backend = open_gpu(device);
  return with_policy(policy, [&]<EvictionPolicy Policy>(Type<Policy>) -> std::shared_ptr<AnyCache> {
    return std::make_shared<Cache<CudaBackend, Policy>>(
        backend, store, pinned(backend, store.store, host_bytes, report), budget);
  });
}

std::shared_ptr<AnyPredictor> make_predictor(PredictorWeights weights, const std::string& device) {
  const CudaBackend backend = open_gpu(device);
  return std::make_shared<Predictor<CudaBackend>>(
      HashPredictor<CudaBackend>(backend, std::move(weights)), backend.device());
}

void check(const std::string& device) { open_gpu(device); }

}  // namespace

const CudaPart part{&make_cache, &pin_layers, &make_predictor, &check};

}  // namespace sida::bindings
