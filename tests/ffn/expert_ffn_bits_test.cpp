// SPDX-License-Identifier: Apache-2.0
// Bit-identity: what must not change a single bit of the result.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>
#include <span>
#include <vector>

#include "sida/ffn/expert_ffn_cpu.hpp"
#include "support/catch.hpp"
#include "support/ffn_call.hpp"

namespace sida::test {
namespace {

struct Case {
  MoeConfig config;
  Isa isa = best_isa();
  std::vector<std::vector<std::byte>> slabs;
  LayerInput input;
  TokenGroups groups;
  std::vector<std::byte> expected;
};

/// A layer call with 3 to 60 rows an expert and its result by one thread, all experts at once.
Case make_case(DataType dtype, Isa isa) {
  MoeConfig config;
  config.layers = 1;
  config.experts = 7;
  config.hidden_size = 805;
  config.intermediate_size = 71;
  config.top_k = 2;
  config.activation = Activation::gelu;
  config.gated = config.up_bias = config.down_bias = true;
  config.dtype = dtype;
  LayerInput input = random_input(config, 90, 5);
  for (std::int64_t a = 0; a < 60; ++a) input.ids.set(a, 2);  // one expert with many rows
  for (std::int64_t a = 60; a < 180; a += 20) input.weights.set(a, 0);
  Case c{config,
         isa,
         random_slabs(config, 4),
         input,
         group_tokens(input.ids.view(), input.weights.view(), config.experts),
         {}};
  CpuFfn ffn(config, 1, isa);
  c.expected = run_layer(ffn, c.slabs, input).bytes;
  return c;
}

template <class Body>
void for_each_case(const Body& body) {
  for (const DataType dtype : {DataType::f32, DataType::f16, DataType::bf16, DataType::f64})
    for (const Isa isa : machine_isas()) {
      CAPTURE(name_of(dtype), name_of(isa));
      body(make_case(dtype, isa));
    }
}

TEST_CASE("Bits do not depend on the number of threads", "[bits]") {
  for_each_case([](const Case& c) {
    CpuFfn ffn(c.config, 1, c.isa);
    for (const int threads : {2, 3, 5, 1}) {
      ffn.set_threads(threads);
      CHECK(ffn.threads() == threads);
      CHECK(run_layer(ffn, c.slabs, c.input).bytes == c.expected);
    }
  });
}

TEST_CASE("Bits do not depend on how compute() calls are grouped and ordered", "[bits]") {
  for_each_case([](const Case& c) {
    CpuFfn ffn(c.config, 2, c.isa);
    std::mt19937 random(6);
    for (int repeat = 0; repeat < 3; ++repeat) {
      auto tasks = tasks_of(c.config, c.groups, c.slabs);
      std::shuffle(tasks.begin(), tasks.end(), random);
      Tensor out(c.input.hidden.shape, c.config.dtype);
      ffn.begin(c.input.hidden.view(), c.groups);
      for (std::span<const ExpertTask> left = tasks; !left.empty();) {
        const std::size_t taken = std::min<std::size_t>(left.size(), 1 + random() % 3);
        ffn.compute(left.first(taken));
        left = left.subspan(taken);
      }
      ffn.combine(c.input.weights.view(), out.mutable_view());
      CHECK(out.bytes == c.expected);
    }
  });
}

TEST_CASE("Bits do not depend on where weights, inputs and outputs lie", "[bits]") {
  for_each_case([](const Case& c) {
    CpuFfn ffn(c.config, 2, c.isa);
    for (const std::size_t shift : {1, 4, 34}) {  // even addresses that no element type allows
      const SlabLayout layout(c.config);
      std::vector<std::vector<std::byte>> moved;
      std::vector<ExpertTask> tasks = tasks_of(c.config, c.groups, c.slabs);
      for (std::size_t i = 0; i < tasks.size(); ++i) {
        const auto& slab = c.slabs[static_cast<std::size_t>(c.groups.experts[i])];
        moved.emplace_back(slab.size() + shift);
        std::memcpy(moved.back().data() + shift, slab.data(), slab.size());
        tasks[i].weights = weights_in(layout, moved.back().data() + shift);
      }
      std::vector<std::byte> hidden(c.input.hidden.bytes.size() + shift), out(hidden.size());
      std::memcpy(hidden.data() + shift, c.input.hidden.bytes.data(), hidden.size() - shift);
      ffn.begin({hidden.data() + shift, c.config.dtype, c.input.hidden.shape}, c.groups);
      ffn.compute(tasks);
      ffn.combine(c.input.weights.view(),
                  {out.data() + shift, c.config.dtype, c.input.hidden.shape});
      out.erase(out.begin(), out.begin() + static_cast<std::ptrdiff_t>(shift));
      CHECK(out == c.expected);
    }
  });
}

TEST_CASE("A token's bits do not depend on the other tokens of the call", "[bits]") {
  for_each_case([](const Case& c) {
    CpuFfn ffn(c.config, 2, c.isa);
    const auto row_bytes =
        static_cast<std::int64_t>(c.input.hidden.bytes.size()) / c.input.hidden.shape[0];
    for (const std::int64_t first : {0, 41}) {
      const std::int64_t count = 11;
      LayerInput part{Tensor({count, c.config.hidden_size}, c.config.dtype),
                      Tensor({count, 2}, DataType::i64), Tensor({count, 2}, DataType::f32)};
      std::copy_n(c.input.hidden.bytes.begin() + first * row_bytes, count * row_bytes,
                  part.hidden.bytes.begin());
      for (std::int64_t a = 0; a < count * 2; ++a) {
        part.ids.set(a, c.input.ids.at(first * 2 + a));
        part.weights.set(a, c.input.weights.at(first * 2 + a));
      }
      const Tensor out = run_layer(ffn, c.slabs, part);
      CHECK(std::equal(out.bytes.begin(), out.bytes.end(), c.expected.begin() + first * row_bytes));
    }
  });
}

}  // namespace
}  // namespace sida::test
