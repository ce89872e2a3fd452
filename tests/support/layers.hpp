// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "sida/cache/array_store.hpp"
#include "sida/ffn/routed_call_cpu.hpp"
#include "sida/layer/offloaded_experts.hpp"
#include "support/backends.hpp"
#include "support/ffn_call.hpp"
#include "support/reference_ffn.hpp"

namespace sida::test {

inline constexpr std::int64_t tokens = 13;

inline MoeConfig small_config(DataType dtype = DataType::f32) {
  MoeConfig config;
  config.layers = 3;
  config.experts = 6;
  config.hidden_size = 40;
  config.intermediate_size = 24;
  config.top_k = 2;
  config.activation = Activation::gelu;
  config.gated = config.up_bias = config.down_bias = true;
  config.dtype = dtype;
  return config;
}

/// A model of three layers with random weights, and one batch's input for each layer.
struct Model {
  explicit Model(const MoeConfig& model_config = small_config()) : config(model_config) {
    const SlabLayout layout(config);
    std::vector<std::vector<ArrayPart>> parts;
    for (std::int32_t layer = 0; layer < config.layers; ++layer) {
      slabs.push_back(random_slabs(config, static_cast<std::uint32_t>(layer) + 1));
      inputs.push_back(random_input(config, tokens, static_cast<std::uint32_t>(layer) + 50));
      for (const auto& slab : slabs.back())
        parts.push_back(
            {{layout.up_offset, slab.data() + layout.up_offset, layout.up_bytes},
             {layout.down_offset, slab.data() + layout.down_offset, layout.down_bytes},
             {layout.up_bias_offset, slab.data() + layout.up_bias_offset, layout.up_bias_bytes},
             {layout.down_bias_offset, slab.data() + layout.down_bias_offset,
              layout.down_bias_bytes}});
    }
    store = std::make_shared<ArrayStore>(config.layers, config.experts, layout.slab_bytes, parts);
  }

  MoeConfig config;
  std::vector<std::vector<std::vector<std::byte>>> slabs;
  std::vector<LayerInput> inputs;
  std::shared_ptr<ExpertStore> store;
};

/// The bytes of what `forward(layer)` gives for every layer of a pass that was begun, and its end.
template <class Engine, class Forward>
std::vector<std::byte> outputs_of_pass(Engine& engine, Forward&& forward) {
  std::vector<std::byte> bytes;
  for (std::size_t layer = 0; layer < engine.layers.size(); ++layer) {
    const Tensor out = forward(layer);
    bytes.insert(bytes.end(), out.bytes.begin(), out.bytes.end());
  }
  engine.scheduler->end_pass();
  return bytes;
}

template <class B, class P>
struct Layers {
  Layers(const Model& m, const Budget& budget, std::shared_ptr<ExpertStore> store = nullptr,
         const SchedulerOptions& options = {})
      : model(m),
        cache(backend, store ? store : m.store, budget),
        scheduler(std::make_shared<OffloadScheduler<B, P>>(backend, cache, options)) {
    auto ffn = std::make_shared<ExpertFfn<B>>(m.config, 2);
    for (std::int32_t layer = 0; layer < m.config.layers; ++layer)
      layers.emplace_back(m.config, layer, scheduler, ffn);
  }

  Tensor forward(std::size_t layer) {
    const LayerInput& input = model.inputs[layer];
    Tensor out(input.hidden.shape, model.config.dtype);
    std::optional<Tensor> next;
    if (look_ahead && layer + 1 < layers.size()) {
      next = model.inputs[layer + 1].ids;
      for (std::int64_t i = 0; i < next->elements(); ++i)
        next->set(i, static_cast<std::int32_t>(next->at(i) + *look_ahead) % model.config.experts);
    }
    layers[layer].forward(input.hidden.view(), input.ids.view(), input.weights.view(),
                          out.mutable_view(), next ? next->view() : ConstTensorView{});
    return out;
  }
  Tensor forward_predicted(std::size_t layer) {
    Tensor out(model.inputs[layer].hidden.shape, model.config.dtype);
    layers[layer].forward_predicted(model.inputs[layer].hidden.view(), out.mutable_view());
    return out;
  }
  /// One pass through all layers; the bytes of every output.
  std::vector<std::byte> pass(std::optional<HashTable> table = {},
                              std::span<const std::uint8_t> mask = {}) {
    scheduler->begin_pass(std::move(table), 0, mask);
    return rest_of_pass();
  }
  /// All layers of the pass that was begun, and its end.
  std::vector<std::byte> rest_of_pass() {
    return outputs_of_pass(*this, [&](std::size_t layer) { return forward(layer); });
  }

  /// What is added to the next layer's expert ids where they are told ahead; 0: right guesses.
  std::optional<std::int32_t> look_ahead;
  const Model& model;
  B backend;
  ExpertCache<B, P> cache;
  std::shared_ptr<OffloadScheduler<B, P>> scheduler;
  std::vector<OffloadedExperts<B, P>> layers;
};

using Default = Layers<CpuBackend, LookAheadPolicy>;

}  // namespace sida::test
