// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "cuda/device.hpp"
#include "sida/cache/pinned_store.hpp"
#include "sida/ffn/expert_ffn_cuda.hpp"
#include "sida/layer/offloaded_experts.hpp"
#include "sida/schedule/slab_loader_cuda.hpp"
#include "support/layers.hpp"

namespace sida::test {

/// Host memory that holds all experts of the models here.
inline constexpr std::size_t all_pinned = std::size_t{1} << 30;

/// A copy of a tensor on the GPU.
struct OnDevice {
  explicit OnDevice(const Tensor& tensor) : bytes(tensor.bytes.size()) {
    buffer.fill(tensor.bytes);
    view = {buffer.data(), tensor.type, tensor.shape};
  }
  std::size_t bytes;
  DeviceBuffer buffer;
  ConstTensorView view;
};

/// The model's layers on the GPU, like Layers; ends what they are made of in the right order.
template <class Policy>
struct OnGpu {
  OnGpu(const Model& m, std::size_t host_bytes, const Budget& budget,
        std::shared_ptr<ExpertStore> store = nullptr, const SchedulerOptions& options = {},
        int device = 0)
      : model(m),
        backend(device),
        cache(backend, std::make_shared<PinnedStore>(backend, store ? store : m.store, host_bytes),
              budget),
        scheduler(std::make_shared<OffloadScheduler<CudaBackend, Policy>>(backend, cache, options)),
        ffn(std::make_shared<ExpertFfn<CudaBackend>>(backend, m.config)) {
    for (std::int32_t layer = 0; layer < m.config.layers; ++layer)
      layers.emplace_back(m.config, layer, scheduler, ffn);
  }

  Tensor forward(std::size_t layer) {
    const LayerInput& input = model.inputs[layer];
    const OnDevice hidden(input.hidden), ids(input.ids), weights(input.weights);
    return output(
        [&](const TensorView& out) {
          layers[layer].forward(hidden.view, ids.view, weights.view, out);
        },
        layer);
  }
  Tensor forward_predicted(std::size_t layer) {
    const OnDevice hidden(model.inputs[layer].hidden);
    return output([&](const TensorView& out) { layers[layer].forward_predicted(hidden.view, out); },
                  layer);
  }
  std::vector<std::byte> pass(std::optional<HashTable> table = {}) {
    scheduler->begin_pass(std::move(table), 0, {});
    return rest_of_pass();
  }
  std::vector<std::byte> rest_of_pass() {
    return outputs_of_pass(*this, [&](std::size_t layer) { return forward(layer); });
  }

  /// What `call` writes to memory that was full of NaNs.
  template <class Call>
  Tensor output(Call&& call, std::size_t layer) {
    Tensor result(model.inputs[layer].hidden.shape, model.config.dtype);
    DeviceBuffer out;
    out.poison(result.bytes.size());
    call(TensorView{out.data(), result.type, result.shape});
    check_cuda(cudaStreamSynchronize(ffn->stream()));
    copy_to_host(result.bytes.data(), out.data(), result.bytes.size());
    return result;
  }

  const Model& model;
  CudaBackend backend;
  ExpertCache<CudaBackend, Policy> cache;
  std::shared_ptr<OffloadScheduler<CudaBackend, Policy>> scheduler;
  std::shared_ptr<ExpertFfn<CudaBackend>> ffn;
  std::vector<OffloadedExperts<CudaBackend, Policy>> layers;
};

/// A batch's inputs of every layer on the GPU, and room for the outputs: calls with it wait for
/// nothing.
class BatchOnGpu {
 public:
  struct Call {
    explicit Call(const LayerInput& input)
        : hidden(input.hidden), ids(input.ids), weights(input.weights) {
      memory.poison(input.hidden.bytes.size());
      out = {memory.data(), input.hidden.type, input.hidden.shape};
    }
    OnDevice hidden, ids, weights;
    DeviceBuffer memory;
    TensorView out;
  };

  explicit BatchOnGpu(const std::vector<LayerInput>& inputs) {
    for (const LayerInput& input : inputs) calls_.emplace_back(input);
  }

  const Call& operator[](std::size_t layer) const { return calls_[layer]; }

  /// Enqueues a pass that was begun, and ends it. `foretold` uses the pass's table alone.
  template <class Engine>
  void enqueue(Engine& engine, bool foretold = false) const {
    for (std::size_t l = 0; l < calls_.size(); ++l) {
      const Call& call = calls_[l];
      if (foretold)
        engine.layers[l].forward_predicted(call.hidden.view, call.out);
      else
        engine.layers[l].forward(call.hidden.view, call.ids.view, call.weights.view, call.out);
    }
    engine.scheduler->end_pass();
  }
  /// The bytes of every output, once what was enqueued is done.
  std::vector<std::byte> outputs() const {
    std::vector<std::byte> bytes;
    for (const Call& call : calls_) {
      std::vector<std::byte> out(call.hidden.bytes);
      copy_to_host(out.data(), call.out.data, out.size());
      bytes.insert(bytes.end(), out.begin(), out.end());
    }
    return bytes;
  }

 private:
  std::deque<Call> calls_;
};

}  // namespace sida::test
