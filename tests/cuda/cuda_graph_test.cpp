// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <vector>

#include "cuda/device.hpp"
#include "cuda/layers_on_gpu.hpp"
#include "support/catch.hpp"
#include "support/layers.hpp"

using namespace sida;
using namespace sida::test;

namespace {

MoeConfig config_of(DataType dtype, int top_k) {
  MoeConfig config = small_config(dtype);
  config.top_k = top_k;
  return config;
}

/// The layers of an engine in one CUDA graph, which reads its inputs where they were put last.
class LayersInGraph {
 public:
  explicit LayersInGraph(OnGpu<LruPolicy>& engine) : engine_(engine), batch_(engine.model.inputs) {
    const FaultsExempt exempt;
    check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    for (auto& layer : engine.layers) layer.load_all();
    for (std::size_t l = 0; l < engine.layers.size(); ++l)
      workspaces_.emplace_back().poison(engine.layers[l].graph_workspace_bytes(
          batch_[l].ids.view.shape[0], static_cast<std::int32_t>(batch_[l].ids.view.shape[1])));
    check_cuda(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    for (std::size_t l = 0; l < engine.layers.size(); ++l) {
      const BatchOnGpu::Call& call = batch_[l];
      engine.layers[l].capture(call.hidden.view, call.ids.view, call.weights.view, call.out,
                               workspaces_[l].data(), stream_);
    }
    check_cuda(cudaStreamEndCapture(stream_, &graph_));
    check_cuda(cudaGraphInstantiate(&replayed_, graph_, 0));
  }
  LayersInGraph(const LayersInGraph&) = delete;
  LayersInGraph& operator=(const LayersInGraph&) = delete;
  ~LayersInGraph() {
    cudaStreamSynchronize(stream_);
    cudaGraphExecDestroy(replayed_);
    cudaGraphDestroy(graph_);
    cudaStreamDestroy(stream_);
  }

  /// Reads the model's inputs as they are now.
  void put_inputs() {
    for (std::size_t l = 0; l < workspaces_.size(); ++l) {
      const LayerInput& input = engine_.model.inputs[l];
      copy_to_device(batch_[l].hidden.buffer.data(), input.hidden.bytes);
      copy_to_device(batch_[l].ids.buffer.data(), input.ids.bytes);
      copy_to_device(batch_[l].weights.buffer.data(), input.weights.bytes);
    }
  }
  /// Enqueues a pass whose layers are replayed.
  void enqueue(std::uint64_t key = 0, std::span<const std::uint8_t> mask = {}) {
    auto& any = engine_.layers.front();
    any.begin_replays(stream_);
    engine_.scheduler->begin_pass({}, key, mask);
    check_cuda(cudaGraphLaunch(replayed_, stream_));
    any.end_replays(stream_);
    engine_.scheduler->end_pass();
  }
  /// A pass whose layers are replayed; the bytes of every output.
  std::vector<std::byte> pass(std::uint64_t key = 0, std::span<const std::uint8_t> mask = {}) {
    enqueue(key, mask);
    check_cuda(cudaStreamSynchronize(stream_));
    return batch_.outputs();
  }

 private:
  OnGpu<LruPolicy>& engine_;
  BatchOnGpu batch_;
  std::deque<DeviceBuffer> workspaces_;
  cudaStream_t stream_ = nullptr;
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t replayed_ = nullptr;
};

}  // namespace

TEST_CASE("Layers in a CUDA graph compute and count what the same calls without one do",
          "[cuda][layer][graph]") {
  if (!gpu_found()) return;
  const auto dtype = GENERATE(DataType::f32, DataType::bf16);
  const auto top_k = GENERATE(2, 3);  // few choices are planned by the kernels that compute
  Model model(config_of(dtype, top_k));
  std::vector<std::uint8_t> mask(tokens, 1);
  mask[0] = mask[7] = 0;
  OnGpu<LruPolicy> engine(model, all_pinned, Budget::fraction(1));
  OnGpu<LruPolicy> eager(model, all_pinned, Budget::fraction(1));
  LayersInGraph graph(engine);
  CHECK(engine.scheduler->stats().total.uses == 0);
  for (std::uint64_t pass = 0; pass < 5; ++pass) {
    std::rotate(model.inputs.begin(), model.inputs.begin() + 1, model.inputs.end());
    graph.put_inputs();
    const std::vector<std::byte> got = graph.pass(pass, mask);
    eager.scheduler->begin_pass({}, pass, mask);
    REQUIRE(got == eager.rest_of_pass());
    if (pass != 2) continue;
    engine.ffn->set_stream(nullptr);  // another than the replays'
    REQUIRE(engine.pass() == eager.pass());
  }
  const CacheStats got = engine.scheduler->stats(), expected = eager.scheduler->stats();
  for (std::size_t layer = 0; layer < engine.layers.size(); ++layer) {
    CHECK(got.layers[layer].calls == 6);
    CHECK(got.layers[layer].uses == expected.layers[layer].uses);
    CHECK(got.layers[layer].hits == got.layers[layer].uses);
  }
  const HashTable routing = engine.scheduler->recorded(), wanted = eager.scheduler->recorded();
  CHECK(routing.keys == wanted.keys);
  CHECK(routing.ids == wanted.ids);
  CHECK(routing.probs == wanted.probs);
  CHECK(routing.scale == wanted.scale);
}

TEST_CASE("Replays that wait for nothing are counted, and do not meet calls on other streams",
          "[cuda][layer][graph]") {
  if (!gpu_found()) return;
  const auto top_k = GENERATE(2, 3);
  constexpr std::uint64_t passes = 12;
  const Model model(config_of(DataType::bf16, top_k));
  OnGpu<LruPolicy> engine(model, all_pinned, Budget::fraction(1));
  OnGpu<LruPolicy> eager(model, all_pinned, Budget::fraction(1));
  LayersInGraph graph(engine);
  std::deque<BatchOnGpu> batches;
  for (std::uint64_t pass = 0; pass < passes; ++pass) batches.emplace_back(model.inputs);
  for (std::uint64_t pass = 0; pass < passes; ++pass) {
    graph.enqueue(2 * pass);
    engine.ffn->set_stream(nullptr);
    engine.scheduler->begin_pass({}, 2 * pass + 1, {});
    batches[pass].enqueue(engine);
  }
  std::vector<std::byte> expected;
  for (std::uint64_t pass = 0; pass < 2 * passes; ++pass) {
    eager.scheduler->begin_pass({}, pass, {});
    expected = eager.rest_of_pass();
  }
  CHECK(engine.scheduler->stats().total.calls == eager.scheduler->stats().total.calls);
  CHECK(engine.scheduler->stats().total.uses == eager.scheduler->stats().total.uses);
  CHECK(engine.scheduler->recorded().ids == eager.scheduler->recorded().ids);
  CHECK(engine.scheduler->recorded().scale == eager.scheduler->recorded().scale);
  engine.ffn->synchronize();
  for (const BatchOnGpu& batch : batches) REQUIRE(batch.outputs() == expected);
  CHECK(graph.pass(2 * passes) == expected);
}

TEST_CASE("An expert id out of range in a CUDA graph touches no memory, and raises later",
          "[cuda][layer][graph]") {
  if (!gpu_found()) return;
  Model model;
  OnGpu<LruPolicy> engine(model, all_pinned, Budget::fraction(1));
  LayersInGraph graph(engine);
  const std::vector<std::byte> expected = graph.pass();
  const double right = model.inputs[1].ids.at(3);
  for (const double id : {7.0, -1.0, 2e9, -2e9}) {
    model.inputs[1].ids.set(3, id);
    graph.put_inputs();
    graph.pass();
    CHECK_THROWS_AS(engine.scheduler->stats(), OutOfRange);
    graph.pass();
    graph.pass();
    CHECK_THROWS_AS(graph.pass(), OutOfRange);  // of the pass before the last
    model.inputs[1].ids.set(3, right);
    graph.put_inputs();
    CHECK_THROWS_AS(engine.scheduler->stats(), OutOfRange);
    CHECK(graph.pass() == expected);
    CHECK_NOTHROW(engine.scheduler->stats());
  }
}

TEST_CASE("Only a layer all of whose experts stay goes into a CUDA graph", "[cuda][layer][graph]") {
  if (!gpu_found()) return;
  const Model model;
  const auto capture = [&](OnGpu<LruPolicy>& engine) {
    const LayerInput& input = model.inputs[0];
    const OnDevice hidden(input.hidden), ids(input.ids), weights(input.weights);
    DeviceBuffer out;
    out.poison(input.hidden.bytes.size());
    engine.layers[0].capture(hidden.view, ids.view, weights.view,
                             {out.data(), input.hidden.type, input.hidden.shape}, out.data(),
                             static_cast<cudaStream_t>(nullptr));
  };
  OnGpu<LruPolicy> few(model, all_pinned, Budget::experts(2));
  CHECK_FALSE(few.layers[0].may_be_captured());
  few.layers[0].load_all();
  CHECK_THROWS_AS(capture(few), StateError);
  OnGpu<LruPolicy> all(model, all_pinned, Budget::fraction(1));
  CHECK(all.layers[0].may_be_captured());
  CHECK_THROWS_AS(capture(all), StateError);  // none was brought
  all.layers[0].load_all();
  all.scheduler->resize(Budget::fraction(1));
  CHECK_THROWS_AS(capture(all), StateError);  // they are gone again
}
