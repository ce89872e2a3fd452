// SPDX-License-Identifier: Apache-2.0
#include <deque>
#include <optional>
#include <vector>

#include "cuda/device.hpp"
#include "cuda/layers_on_gpu.hpp"
#include "support/catch.hpp"
#include "support/layers.hpp"

using namespace sida;
using namespace sida::test;

TEST_CASE("On the GPU a layer computes what its definition says", "[cuda][layer][racecheck]") {
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
  const HashTable routing = all.scheduler->recorded();
  for (const int slots : {1, 2, 3, 7, 18}) {
    for (const std::size_t host_bytes : {all_pinned, std::size_t{40'000}}) {
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

TEST_CASE("On the GPU an expert id out of range touches no memory and raises", "[cuda][layer]") {
  if (!gpu_found()) return;
  const Model model;
  const Budget budget = GENERATE(Budget::experts(2), Budget::fraction(1));
  OnGpu<LruPolicy> engine(model, all_pinned, budget);
  const std::vector<std::byte> expected = engine.pass();
  for (const double id : {7.0, -1.0, 2e9, -2e9}) {
    Model wrong;
    wrong.inputs[1].ids.set(3, id);
    OnGpu<LruPolicy> other(wrong, all_pinned, budget);
    wrong.inputs[1].ids.set(3, model.inputs[1].ids.at(3));
    REQUIRE(other.pass() == expected);  // all experts are there, if they fit
    wrong.inputs[1].ids.set(3, id);
    // At once where experts are to be brought, else by what reads the counts or calls next.
    CHECK_THROWS_AS((other.pass(), other.scheduler->stats()), OutOfRange);
    wrong.inputs[1].ids.set(3, model.inputs[1].ids.at(3));
    CHECK(other.pass() == expected);
    CHECK_NOTHROW(other.scheduler->stats());
  }
}

TEST_CASE("On the GPU the sentinel E is no expert", "[cuda][layer][racecheck]") {
  if (!gpu_found()) return;
  Model model;
  OnGpu<LruPolicy> left_out(model, all_pinned, Budget::experts(2));
  for (std::int64_t a = 0; a < model.inputs[0].ids.elements(); ++a) model.inputs[0].ids.set(a, 6);
  left_out.scheduler->begin_pass({}, 0, {});
  const Tensor out = left_out.forward(0);
  for (std::int64_t i = 0; i < out.elements(); ++i) CHECK(out.at(i) == 0);
  left_out.scheduler->end_pass();
  CHECK(left_out.scheduler->stats().total.uses == 0);
}

TEST_CASE("On the GPU counts and routing are those of the CPU, with all experts kept and few",
          "[cuda][layer]") {
  if (!gpu_found()) return;
  const Model model;
  std::vector<std::uint8_t> mask(tokens, 1);
  mask[0] = mask[7] = 0;
  const auto skip_padding = GENERATE(false, true);
  Layers<CpuBackend, LruPolicy> cpu(model, Budget::fraction(1));
  for (const Budget& budget : {Budget::experts(3), Budget::fraction(1)}) {
    OnGpu<LruPolicy> gpu(model, all_pinned, budget);
    const auto run = [&](auto& engine) {
      for (auto& layer : engine.layers) layer.set_skip_padding(skip_padding);
      for (std::uint64_t pass = 0; pass < 40; ++pass) {  // more calls than are on their way
        engine.scheduler->begin_pass({}, pass, mask);
        for (std::size_t layer = 0; layer < 3; ++layer) engine.forward(layer);
        engine.scheduler->end_pass();
      }
    };
    cpu.scheduler->reset_stats();
    run(cpu);
    run(gpu);
    const CacheStats expected = cpu.scheduler->stats(), got = gpu.scheduler->stats();
    for (std::size_t layer = 0; layer < 3; ++layer) {
      CHECK(got.layers[layer].calls == 40);
      CHECK(got.layers[layer].uses == expected.layers[layer].uses);
    }
    CHECK(got.total.uses == got.total.hits + got.total.late + got.total.misses);
    const HashTable routing = gpu.scheduler->recorded(), wanted = cpu.scheduler->recorded();
    CHECK(routing.keys == wanted.keys);
    CHECK(routing.ids == wanted.ids);
    CHECK(routing.probs == wanted.probs);
    CHECK(routing.scale == wanted.scale);
  }
}

TEST_CASE("On the GPU predicted routing with the recorded table computes what exact routing does",
          "[cuda][layer][predicted]") {
  if (!gpu_found()) return;
  const Model model(small_config(DataType::bf16));
  OnGpu<LookAheadPolicy> all(model, all_pinned, Budget::fraction(1));
  const std::vector<std::byte> expected = all.pass();
  const HashTable table = all.scheduler->recorded();
  for (const int slots : {1, 5, 18}) {
    OnGpu<LookAheadPolicy> engine(model, all_pinned, Budget::experts(slots));
    for (int turn = 0; turn < 3; ++turn) {
      engine.scheduler->begin_pass(table, 0, {});
      REQUIRE(outputs_of_pass(engine, [&](std::size_t layer) {
                return engine.forward_predicted(layer);
              }) == expected);
    }
    const CacheStats stats = engine.scheduler->stats();
    CHECK(stats.total.predicted_calls == 9);
    CHECK(stats.total.uses == stats.total.hits + stats.total.late + stats.total.misses);
  }
}

namespace {

/// What a model is given, and its routing there.
struct Given {
  Given(const Model& model, std::int64_t count, std::uint32_t seed)
      : mask(static_cast<std::size_t>(count), 1) {
    for (std::uint32_t layer = 0; layer < 3; ++layer)
      inputs.push_back(random_input(model.config, count, seed + layer));
    mask[seed] = mask[7] = 0;
    OnGpu<LruPolicy> engine(model, all_pinned, Budget::fraction(1));
    engine.scheduler->begin_pass({}, seed, mask);
    BatchOnGpu(inputs).enqueue(engine);
    table = engine.scheduler->recorded();
  }
  std::vector<LayerInput> inputs;
  std::vector<std::uint8_t> mask;
  HashTable table;
};

}  // namespace

TEST_CASE("Calls that wait for nothing do what those do that each wait for the one before",
          "[cuda][layer]") {
  if (!gpu_found()) return;
  const auto dtype = GENERATE(DataType::f32, DataType::bf16);
  const Budget budget = GENERATE(Budget::experts(3), Budget::fraction(1));
  const auto streams = GENERATE(as<std::size_t>(), 1, 3);
  const Model model(small_config(dtype));
  // The last needs more memory, of each kind, than what was enqueued before it.
  const Given givens[] = {{model, tokens, 1}, {model, tokens, 2}, {model, 1100, 3}};
  const auto given_to = [&](std::size_t pass) -> const Given& {
    return givens[pass == 3 || pass == 5 || pass == 20 ? 2 : pass % 2];
  };
  const auto run = [&](OnGpu<LruPolicy>& engine, bool waits) {
    const CudaBackend::Stream owned[] = {engine.backend.make_stream(), engine.backend.make_stream(),
                                         engine.backend.make_stream()};
    for (auto& layer : engine.layers) layer.set_skip_padding(true);
    std::deque<BatchOnGpu> batches;
    constexpr std::size_t passes = 40;  // more calls than can be on their way
    for (std::size_t pass = 0; pass < passes; ++pass) batches.emplace_back(given_to(pass).inputs);
    for (std::size_t pass = 0; pass < passes; ++pass) {
      const Given& given = given_to(pass);
      const bool is_foretold = pass % 8 == 5;  // from the table alone, which is sent to the GPU
      engine.ffn->set_stream(owned[pass % streams].native());
      engine.scheduler->begin_pass(is_foretold ? std::optional(given.table) : std::nullopt, pass,
                                   given.mask);
      batches[pass].enqueue(engine, is_foretold);
      if (waits) engine.ffn->synchronize();
    }
    CHECK(engine.scheduler->stats().total.calls == 3 * passes);
    engine.ffn->synchronize();
    std::vector<std::vector<std::byte>> outputs;
    for (const BatchOnGpu& batch : batches) outputs.push_back(batch.outputs());
    engine.ffn->set_stream(nullptr);
    return outputs;
  };
  OnGpu<LruPolicy> waiting(model, all_pinned, budget), engine(model, all_pinned, budget);
  const auto expected = run(waiting, true);
  REQUIRE((run(engine, false) == expected));  // many bytes: not to be printed
  CHECK(engine.scheduler->stats().total.uses == waiting.scheduler->stats().total.uses);
  const HashTable routing = engine.scheduler->recorded(), wanted = waiting.scheduler->recorded();
  CHECK(routing.keys == wanted.keys);
  CHECK(routing.ids == wanted.ids);
  CHECK(routing.probs == wanted.probs);
  CHECK(routing.scale == wanted.scale);
}

TEST_CASE("On another GPU a layer computes the same bits, whichever device is current",
          "[cuda][layer]") {
  if (!gpu_found() || CudaBackend::devices() < 2) return;
  const Budget budget = GENERATE(Budget::experts(3), Budget::fraction(1));
  const Model model(small_config(DataType::bf16));
  OnGpu<LruPolicy> first(model, all_pinned, budget);
  const std::vector<std::byte> expected = first.pass();
  OnGpu<LruPolicy> second(model, all_pinned, budget, nullptr, {}, 1);
  check_cuda(cudaSetDevice(1));
  const BatchOnGpu batch(model.inputs);
  check_cuda(cudaSetDevice(0));
  for (const bool is_foretold : {false, true, false}) {
    second.scheduler->begin_pass(
        is_foretold ? std::optional(first.scheduler->recorded()) : std::nullopt, 0, {});
    batch.enqueue(second, is_foretold);
    second.ffn->synchronize();
    REQUIRE(batch.outputs() == expected);
  }
  int current = -1;
  check_cuda(cudaGetDevice(&current));
  CHECK(current == 0);
}

TEST_CASE("Work on two streams by turns gives the same bits", "[cuda][layer]") {
  if (!gpu_found()) return;
  const Model model;
  OnGpu<LruPolicy> engine(model, all_pinned, Budget::fraction(1));
  const std::vector<std::byte> expected = engine.pass();
  CudaBackend::Stream streams[] = {engine.backend.make_stream(), engine.backend.make_stream()};
  for (int turn = 0; turn < 20; ++turn) {
    engine.ffn->set_stream(streams[turn % 2].native());
    REQUIRE(engine.pass() == expected);
  }
  engine.ffn->set_stream(nullptr);
  CHECK(engine.pass() == expected);
}
