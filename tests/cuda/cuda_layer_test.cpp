// SPDX-License-Identifier: Apache-2.0
#include <memory>
#include <optional>
#include <vector>

#include "cuda/device.hpp"
#include "sida/cache/pinned_store.hpp"
#include "sida/ffn/expert_ffn_cuda.hpp"
#include "sida/layer/offloaded_experts.hpp"
#include "sida/schedule/slab_loader_cuda.hpp"
#include "support/catch.hpp"
#include "support/layers.hpp"

using namespace sida;
using namespace sida::test;

namespace {

// The model's layers on the GPU; ends what they are made of in the right order.
template <class Policy>
struct OnGpu {
  OnGpu(const Model& m, std::size_t host_bytes, const Budget& budget)
      : model(m),
        cache(backend, std::make_shared<PinnedStore>(backend, m.store, host_bytes), budget),
        scheduler(std::make_shared<OffloadScheduler<CudaBackend, Policy>>(backend, cache)),
        ffn(std::make_shared<ExpertFfn<CudaBackend>>(backend, m.config)) {
    for (std::int32_t layer = 0; layer < m.config.layers; ++layer)
      layers.emplace_back(m.config, layer, scheduler, ffn);
  }

  Tensor forward(std::size_t layer) {
    const LayerInput& input = model.inputs[layer];
    DeviceBuffer hidden, out;
    hidden.fill(input.hidden.bytes);
    out.poison(input.hidden.bytes.size());
    layers[layer].forward({hidden.data(), model.config.dtype, input.hidden.shape}, input.ids.view(),
                          input.weights.view(),
                          {out.data(), model.config.dtype, input.hidden.shape});
    check_cuda(cudaStreamSynchronize(ffn->stream()));
    Tensor result(input.hidden.shape, model.config.dtype);
    copy_to_host(result.bytes.data(), out.data(), result.bytes.size());
    return result;
  }
  std::vector<std::byte> pass(std::optional<HashTable> table = {}) {
    scheduler->begin_pass(std::move(table), 0, {});
    std::vector<std::byte> bytes;
    for (std::size_t layer = 0; layer < layers.size(); ++layer) {
      const Tensor out = forward(layer);
      bytes.insert(bytes.end(), out.bytes.begin(), out.bytes.end());
    }
    scheduler->end_pass();
    return bytes;
  }

  const Model& model;
  CudaBackend backend;
  ExpertCache<CudaBackend, Policy> cache;
  std::shared_ptr<OffloadScheduler<CudaBackend, Policy>> scheduler;
  std::shared_ptr<ExpertFfn<CudaBackend>> ffn;
  std::vector<OffloadedExperts<CudaBackend, Policy>> layers;
};

constexpr std::size_t all_pinned = std::size_t{1} << 30;

}  // namespace

TEST_CASE("On the GPU a layer computes what its definition says", "[cuda][layer]") {
  if (!gpu_found()) return;
  const auto dtype = GENERATE(DataType::f32, DataType::f16, DataType::bf16);
  const Model model(small_config(dtype));
  OnGpu<LookAheadPolicy> engine(model, all_pinned, Budget::experts(2));
  engine.scheduler->begin_pass({}, 0, {});
  for (std::size_t layer = 0; layer < 3; ++layer) {
    const LayerInput& input = model.inputs[layer];
    const Tensor out = engine.forward(layer);
    const Matrix got = matrix(out.bytes.data(), dtype, tokens, model.config.hidden_size);
    const auto& slabs = model.slabs[layer];
    const Matrix expected =
        reference_layer(model.config, slabs, input.hidden, input.ids, input.weights);
    CHECK(relative_error(got, expected) <= tolerance(dtype));
    // Leaving out one routed expert of one token would be seen.
    const Matrix wrong =
        reference_layer(model.config, slabs, input.hidden, input.ids, input.weights, 7);
    CHECK(relative_error(got, wrong) > 1e-2);
  }
}

TEMPLATE_TEST_CASE("On the GPU results are the same bits at every budget and prediction",
                   "[cuda][layer]", FifoPolicy, LruPolicy, LfuPolicy, LookAheadPolicy) {
  if (!gpu_found()) return;
  const auto dtype = GENERATE(DataType::f32, DataType::bf16);
  const Model model(small_config(dtype));
  OnGpu<TestType> all(model, all_pinned, Budget::fraction(1));
  const std::vector<std::byte> expected = all.pass();
  const HashTable routing = all.scheduler->recorder().table();
  for (const int slots : {1, 2, 3, 7, 18}) {
    for (const std::size_t host_bytes : {all_pinned, std::size_t{20'000}}) {
      OnGpu<TestType> engine(model, host_bytes, Budget::experts(slots));
      for (int turn = 0; turn < 3; ++turn) {
        REQUIRE(engine.pass() == expected);
        REQUIRE(engine.pass(routing) == expected);
      }
    }
  }
}

TEST_CASE("The GPU's FFN refuses what its kernels do not compute", "[cuda][layer]") {
  if (!gpu_found()) return;
  CudaBackend backend;
  CHECK_THROWS_AS(ExpertFfn<CudaBackend>(backend, small_config(DataType::f64)), InvalidArgument);
  MoeConfig config = small_config();
  config.experts = 513;
  CHECK_THROWS_AS(ExpertFfn<CudaBackend>(backend, config), InvalidArgument);
}

TEST_CASE("An expert id out of range raises and the next call is right", "[cuda][layer]") {
  if (!gpu_found()) return;
  const Model model;
  OnGpu<LruPolicy> engine(model, all_pinned, Budget::experts(2));
  const std::vector<std::byte> expected = engine.pass();
  Model wrong;
  wrong.inputs[1].ids.set(3, 6);
  OnGpu<LruPolicy> other(wrong, all_pinned, Budget::experts(2));
  CHECK_THROWS_AS(other.pass(), OutOfRange);
  wrong.inputs[1] = model.inputs[1];
  CHECK(other.pass() == expected);
}
