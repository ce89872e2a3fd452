// SPDX-License-Identifier: Apache-2.0
#include "sida/layer/offloaded_experts.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <optional>
#include <random>
#include <thread>
#include <vector>

#include "support/backends.hpp"
#include "support/catch.hpp"
#include "support/ffn_call.hpp"
#include "support/layers.hpp"
#include "support/reference_ffn.hpp"

namespace sida::test {
namespace {

/// A store that hands every read on after a random delay; not an ArrayStore, so never in place.
class DelayedStore : public ExpertStore {
 public:
  DelayedStore(std::shared_ptr<ExpertStore> store, std::uint32_t seed)
      : store_(std::move(store)), random_(seed) {}
  std::int32_t layers() const noexcept override { return store_->layers(); }
  std::int32_t experts() const noexcept override { return store_->experts(); }
  std::size_t slab_bytes() const noexcept override { return store_->slab_bytes(); }
  void read(ExpertId id, std::size_t offset, std::span<std::byte> destination) override {
    std::chrono::microseconds delay{0};
    {
      const std::lock_guard lock(mutex_);
      delay = std::chrono::microseconds(random_() % 3 ? 0 : random_() % 200);
    }
    std::this_thread::sleep_for(delay);
    store_->read(id, offset, destination);
  }

 private:
  std::shared_ptr<ExpertStore> store_;
  std::mutex mutex_;
  std::mt19937 random_;
};

/// The routing of one exact pass.
HashTable recorded_routing(const Model& model, std::span<const std::uint8_t> mask = {}) {
  Default all(model, Budget::fraction(1));
  all.pass({}, mask);
  return all.scheduler->recorder().table();
}

bool is_zero(const Tensor& tensor, std::int64_t row) {
  const std::int64_t width = tensor.shape[1];
  for (std::int64_t i = 0; i < width; ++i)
    if (tensor.at(row * width + i) != 0) return false;
  return true;
}

}  // namespace

TEST_CASE("A layer computes what its definition says", "[layer]") {
  const auto dtype = GENERATE(DataType::f32, DataType::f16, DataType::bf16, DataType::f64);
  const Model model(small_config(dtype));
  Default engine(model, Budget::experts(2));
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

TEMPLATE_LIST_TEST_CASE("Bits depend on no budget, policy, prediction or timing", "[layer][bits]",
                        Engines) {
  using Engine = Layers<typename TestType::backend, typename TestType::policy>;
  const auto dtype = GENERATE(DataType::f32, DataType::bf16);
  const Model model(small_config(dtype));
  const auto expected = Default(model, Budget::fraction(1)).pass();
  const HashTable right = recorded_routing(model);
  HashTable wrong = right;
  for (std::int32_t& id : wrong.ids) id = (id + 1) % model.config.experts;

  for (const Budget& budget : {Budget::experts(1), Budget::fraction(0.1), Budget::fraction(0.2),
                               Budget::fraction(0.5), Budget::fraction(1)}) {
    for (const HashTable* table :
         {static_cast<const HashTable*>(nullptr), &std::as_const(right), &std::as_const(wrong)}) {
      const auto store = std::make_shared<DelayedStore>(model.store, 9);
      SchedulerOptions options;
      options.transfers.chunk_bytes = 1000;
      Engine delayed(model, budget, store, options), plain(model, budget);
      for (int repetition = 0; repetition < 3; ++repetition) {
        const std::optional<HashTable> given = table ? std::optional(*table) : std::nullopt;
        REQUIRE(delayed.pass(given) == expected);
        REQUIRE(plain.pass(given) == expected);
      }
    }
  }
}

TEST_CASE("All experts of arrays are used in place, and every use is a hit", "[layer]") {
  const Model model;
  Default in_place(model, Budget::fraction(1));
  CHECK(in_place.cache.in_place());
  in_place.pass();
  const auto stats = in_place.scheduler->stats();
  CHECK(stats.total.hits == stats.total.uses);
  CHECK(stats.total.uses > 0);
  CHECK(stats.loads == 0);
  CHECK(stats.total.calls == 3);
}

TEST_CASE("Arrays that are not whole parts are refused in place, not misread", "[layer]") {
  MoeConfig config = small_config();
  config.up_bias = config.down_bias = false;
  const SlabLayout layout(config);
  const auto slab = random_slab(config, 1);
  const auto half = layout.up_bytes / 2;  // gate and up handed over as two arrays
  const std::vector<std::vector<ArrayPart>> parts(
      18, {{0, slab.data(), half},
           {half, slab.data() + half, half},
           {layout.down_offset, slab.data() + layout.down_offset, layout.down_bytes}});
  Model model(config);
  model.store = std::make_shared<ArrayStore>(3, 6, layout.slab_bytes, parts);
  CHECK_THROWS_AS(Default(model, Budget::fraction(1)), InvalidArgument);
  CHECK_NOTHROW(Default(model, Budget::experts(17)).pass());
}

TEST_CASE("Rows of padding are computed unless they are to be skipped", "[layer][padding]") {
  const Model model;
  std::vector<std::uint8_t> mask(tokens, 1);
  mask[3] = mask[9] = 0;
  const auto expected = Default(model, Budget::fraction(1)).pass();
  Default engine(model, Budget::experts(3));
  CHECK(engine.pass({}, mask) == expected);

  engine.scheduler->begin_pass({}, 0, mask);
  engine.layers[1].set_skip_padding(true);
  const Tensor out = engine.forward(1);
  Default whole(model, Budget::fraction(1));
  whole.scheduler->begin_pass({}, 0, {});
  const Tensor all = whole.forward(1);
  for (std::int64_t row = 0; row < tokens; ++row) {
    CAPTURE(row);
    CHECK(is_zero(out, row) == (row == 3 || row == 9));
    if (row == 3 || row == 9) continue;
    for (std::int64_t i = 0; i < model.config.hidden_size; ++i)
      REQUIRE(out.at(row * model.config.hidden_size + i) ==
              all.at(row * model.config.hidden_size + i));
  }
}

TEST_CASE("Padding counts in no rate, is brought by nothing but demand, and is recorded as that",
          "[layer][padding]") {
  Model model;
  LayerInput& input = model.inputs[0];
  for (std::int64_t a = 0; a < 2 * tokens; ++a) input.ids.set(a, static_cast<double>(a % 2));
  input.ids.set(2 * 4, 5);  // token 4, padding, alone uses expert 5
  std::vector<std::uint8_t> mask(tokens, 1);
  mask[4] = 0;
  Default engine(model, Budget::experts(18), std::make_shared<DelayedStore>(model.store, 1));
  engine.scheduler->begin_pass({}, 0, mask);
  engine.forward(0);
  engine.scheduler->end_pass();
  CHECK(engine.scheduler->stats().total.uses == 2);
  CHECK(engine.scheduler->stats().loads == 3);
  const HashTable table = engine.scheduler->recorder().table();
  CHECK(table.ids[table.index(0, 4, 0)] == 5);
  CHECK(table.probs[table.index(0, 4, 0)] == 0);
  CHECK(table.probs[table.index(0, 5, 0)] == 1);
  CHECK(table.ids[table.index(0, 5, 0)] == 0);
  CHECK(table.scale[table.index(0, 5, 0)] == static_cast<float>(input.weights.at(10)));
}

TEMPLATE_LIST_TEST_CASE(
    "Predicted routing with the recorded table computes what exact routing does",
    "[layer][predicted]", Engines) {
  const Model model;
  const auto expected = Default(model, Budget::fraction(1)).pass();
  const HashTable table = recorded_routing(model);
  for (const Budget& budget : {Budget::experts(1), Budget::fraction(0.3), Budget::fraction(1)}) {
    Layers<typename TestType::backend, typename TestType::policy> engine(model, budget);
    engine.scheduler->begin_pass(table, 0, {});
    const auto bytes = outputs_of_pass(engine, [&](std::size_t layer) {
      CHECK(engine.layers[layer].has_prediction());
      return engine.forward_predicted(layer);
    });
    CHECK(bytes == expected);
    CHECK(engine.scheduler->stats().total.predicted_calls == 3);
    CHECK(engine.scheduler->stats().total.misses == 0);
  }
}

TEST_CASE("Predicted routing leaves padding out and refuses what it cannot do",
          "[layer][predicted]") {
  const Model model;
  Default engine(model, Budget::experts(4));
  CHECK_FALSE(engine.layers[0].has_prediction());
  CHECK_THROWS_AS(engine.forward_predicted(0), StateError);

  std::vector<std::uint8_t> mask(tokens, 1);
  mask[0] = 0;
  HashTable table = recorded_routing(model, mask);
  for (std::size_t i = table.index(2, 0, 0); i < table.ids.size(); ++i) table.ids[i] = -1;
  engine.scheduler->begin_pass(table, 0, mask);
  const Tensor out = engine.forward_predicted(0);
  for (std::int64_t row = 0; row < tokens; ++row) CHECK(is_zero(out, row) == (row == 0));
  CHECK_FALSE(engine.layers[2].has_prediction());
  CHECK_THROWS_AS(engine.forward_predicted(2), StateError);
  CHECK_NOTHROW(engine.forward(2));

  Tensor other({tokens + 1, model.config.hidden_size}, model.config.dtype);
  CHECK_THROWS_AS(engine.layers[0].forward_predicted(other.view(), other.mutable_view()),
                  InvalidArgument);
  HashTable narrow = table;
  narrow.candidates = 1;
  narrow.ids.resize(narrow.ids.size() / 2, 0);
  narrow.probs.resize(narrow.ids.size());
  narrow.scale.resize(narrow.ids.size());
  engine.scheduler->begin_pass(narrow, 0, {});
  CHECK_THROWS_AS(engine.forward_predicted(0), InvalidArgument);
}

TEST_CASE("An empty batch is a batch", "[layer]") {
  const Model model;
  Default engine(model, Budget::experts(1));
  engine.scheduler->begin_pass({}, 0, {});
  Tensor hidden({0, model.config.hidden_size}, model.config.dtype);
  const Tensor ids({0, 2}, DataType::i64), weights({0, 2}, DataType::f32);
  CHECK_NOTHROW(
      engine.layers[0].forward(hidden.view(), ids.view(), weights.view(), hidden.mutable_view()));
  CHECK(engine.scheduler->stats().total.uses == 0);
}

TEST_CASE("An id out of range is raised before anything is written", "[layer]") {
  Model model;
  LayerInput& input = model.inputs[0];
  const double right = input.ids.at(5);
  Default engine(model, Budget::experts(2));
  engine.scheduler->begin_pass({}, 0, {});
  const Tensor expected = engine.forward(0);
  for (const double id : {6.0, -1.0, 1e9}) {
    input.ids.set(5, id);
    Tensor out = random_tensor(input.hidden.shape, model.config.dtype, 3);
    const auto before = out.bytes;
    CHECK_THROWS_AS(engine.layers[0].forward(input.hidden.view(), input.ids.view(),
                                             input.weights.view(), out.mutable_view()),
                    OutOfRange);
    CHECK(out.bytes == before);
  }
  input.ids.set(5, right);
  CHECK(engine.forward(0).bytes == expected.bytes);
}

TEST_CASE("A layer must fit the cache that it is given", "[layer]") {
  const Model model;
  Default engine(model, Budget::experts(2));
  const auto make = [&](const MoeConfig& config, std::int32_t layer) {
    return OffloadedExperts<CpuBackend, LookAheadPolicy>(
        config, layer, engine.scheduler, std::make_shared<ExpertFfn<CpuBackend>>(config, 1));
  };
  CHECK_THROWS_AS(make(model.config, 3), OutOfRange);
  CHECK_THROWS_AS(make(model.config, -1), OutOfRange);
  MoeConfig other = model.config;
  other.intermediate_size += 1;
  CHECK_THROWS_AS(make(other, 0), InvalidArgument);
}

TEST_CASE("All experts of a layer are brought as far as there is room, which counts as no call",
          "[layer]") {
  const Model model;
  for (const int slots : {1, 2, 6, 11, 18}) {
    Default engine(model, Budget::experts(slots), std::make_shared<DelayedStore>(model.store, 3));
    engine.layers[1].load_all();
    const std::vector<ExpertId> resident = engine.cache.resident();
    CHECK(std::ssize(resident) == std::min(slots, model.config.experts));
    CHECK(std::ranges::all_of(resident, [](ExpertId id) { return id.layer == 1; }));
    const CacheStats stats = engine.scheduler->stats();
    CHECK(stats.total.calls == 0);
    CHECK(stats.total.uses == 0);
    engine.scheduler->reset_stats();
    engine.scheduler->begin_pass({}, 0, {});
    engine.forward(1);
    if (slots >= model.config.experts) CHECK(engine.scheduler->stats().total.misses == 0);
    CHECK(engine.scheduler->stats().total.calls == 1);
    CHECK_FALSE(engine.layers[1].may_be_captured());  // only a GPU's
  }
}

TEST_CASE("Calls from several threads take turns", "[layer][threads]") {
  const Model model;
  Default whole(model, Budget::fraction(1));
  whole.scheduler->begin_pass({}, 0, {});
  std::vector<Tensor> expected;
  for (std::size_t layer = 0; layer < 3; ++layer) expected.push_back(whole.forward(layer));

  Default engine(model, Budget::experts(2));
  std::atomic<int> wrong = 0;
  std::vector<std::thread> threads;
  for (std::size_t layer = 0; layer < 3; ++layer)
    threads.emplace_back([&, layer] {
      for (int i = 0; i < 30; ++i) {
        if (layer == 0) engine.scheduler->begin_pass({}, 0, {});
        wrong += engine.forward(layer).bytes != expected[layer].bytes;
        engine.scheduler->stats();
      }
    });
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == 0);
}

TEST_CASE("Closing during a layer call ends it with an error", "[layer][threads]") {
  const Model model;
  for (int round = 0; round < 20; ++round) {
    Default engine(model, Budget::experts(1),
                   std::make_shared<DelayedStore>(model.store, static_cast<std::uint32_t>(round)));
    std::thread caller([&] {
      try {
        for (;;) engine.pass();
      } catch (const StateError&) {  // the only way out
      }
    });
    std::this_thread::sleep_for(std::chrono::microseconds(300 * round));
    engine.scheduler->close();
    caller.join();
  }
}

}  // namespace sida::test
