// SPDX-License-Identifier: Apache-2.0
#include "sida/ffn/expert_ffn_cpu.hpp"

#include <limits>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/ffn_call.hpp"
#include "support/reference_ffn.hpp"

namespace sida::test {
namespace {

MoeConfig make_config(std::int32_t hidden, std::int32_t intermediate, std::int32_t experts,
                      std::int32_t top_k, DataType dtype) {
  MoeConfig config;
  config.layers = 1;
  config.experts = experts;
  config.hidden_size = hidden;
  config.intermediate_size = intermediate;
  config.top_k = top_k;
  config.dtype = dtype;
  return config;
}

Matrix values_of(const Tensor& tensor) {
  return matrix(tensor.bytes.data(), tensor.type, tensor.shape[0], tensor.shape[1]);
}

double error_of(const MoeConfig& config, Isa isa, std::int64_t tokens) {
  const auto slabs = random_slabs(config, 1);
  const LayerInput input = random_input(config, tokens, 2);
  CpuFfn ffn(config, 2, isa);
  return relative_error(values_of(run_layer(ffn, slabs, input)),
                        reference_layer(config, slabs, input.hidden, input.ids, input.weights));
}

constexpr DataType storage_types[] = {DataType::f32, DataType::f16, DataType::bf16, DataType::f64};

TEST_CASE("Every activation, form, storage type and instruction set agrees with the f64 reference",
          "[expert_ffn]") {
  for (const DataType dtype : storage_types)
    for (const Activation activation :
         {Activation::relu, Activation::relu2, Activation::gelu, Activation::gelu_tanh,
          Activation::silu, Activation::silu_clamped, Activation::swiglu_clamped})
      for (int form = is_clamped(activation); form < 8; form += is_clamped(activation) ? 2 : 1)
        for (const Isa isa : machine_isas()) {
          MoeConfig config = make_config(77, 101, 5, 2, dtype);
          config.activation = activation;
          config.gated = form & 1;
          config.up_bias = form & 2;
          config.down_bias = form & 4;
          config.limit = 0.5f;  // clamped activations do cut something
          CAPTURE(name_of(dtype), name_of(activation), form, name_of(isa));
          CHECK(error_of(config, isa, 23) <= tolerance(dtype));
        }
}

TEST_CASE("Sizes that fit no vector, block or cache agree with the reference", "[expert_ffn]") {
  struct Size {
    std::int32_t hidden, intermediate, experts, top_k;
    std::int64_t tokens;
  };
  const Size size = GENERATE(values<Size>({{1, 1, 1, 1, 1},
                                           {1, 33, 3, 2, 5},
                                           {65, 1, 3, 3, 9},
                                           {16, 32, 16, 16, 7},
                                           {31, 17, 2, 1, 200},
                                           {96, 64, 3, 1, 500},
                                           {800, 1700, 4, 2, 3},
                                           {48, 900, 1, 1, 120}}));
  for (const DataType dtype : storage_types)
    for (const Isa isa : machine_isas()) {
      MoeConfig config =
          make_config(size.hidden, size.intermediate, size.experts, size.top_k, dtype);
      config.up_bias = config.down_bias = config.gated = true;
      CAPTURE(size.hidden, size.intermediate, name_of(dtype), name_of(isa));
      CHECK(error_of(config, isa, size.tokens) <= tolerance(dtype));
    }
}

TEST_CASE("More intermediate rows than fit in memory together are computed in parts",
          "[expert_ffn]") {
  const MoeConfig config = make_config(8, 40000, 2, 1, DataType::f32);
  CHECK(error_of(config, best_isa(), 150) <= tolerance(config.dtype));
}

TEST_CASE("The tolerance would catch one expert of one token left out", "[expert_ffn]") {
  for (const DataType dtype : storage_types) {
    const MoeConfig config = make_config(64, 96, 8, 2, dtype);
    const auto slabs = random_slabs(config, 1);
    const LayerInput input = random_input(config, 40, 2);
    CpuFfn ffn(config, 1);
    const Matrix got = values_of(run_layer(ffn, slabs, input));
    const auto error = [&](std::int64_t skip) {
      return relative_error(
          got, reference_layer(config, slabs, input.hidden, input.ids, input.weights, skip));
    };
    CAPTURE(name_of(dtype));
    CHECK(error(-1) <= tolerance(dtype));
    for (const std::int64_t skip : {0, 17, 79}) CHECK(error(skip) >= 1e-2);
  }
}

TEST_CASE("Integers come out exactly", "[expert_ffn]") {
  for (const DataType dtype : storage_types)
    for (const Isa isa : machine_isas()) {
      MoeConfig config = make_config(37, 19, 3, 2, dtype);
      config.up_bias = config.down_bias = true;
      auto slabs = random_slabs(config, 1);
      LayerInput input = random_input(config, 13, 2);
      std::mt19937 random(3);
      const auto small = [&](std::byte* data, std::size_t bytes) {  // -1, 0 or 1, mostly 0
        for (std::size_t i = 0; i < bytes / size_of(dtype); ++i)
          store(data, dtype, static_cast<std::int64_t>(i),
                random() % 4 ? 0 : static_cast<double>(random() % 3) - 1);
      };
      for (auto& slab : slabs) small(slab.data(), slab.size());
      small(input.hidden.bytes.data(), input.hidden.bytes.size());
      for (std::int64_t a = 0; a < input.weights.elements(); ++a) input.weights.set(a, 1);
      CpuFfn ffn(config, 2, isa);
      CAPTURE(name_of(dtype), name_of(isa));
      CHECK(values_of(run_layer(ffn, slabs, input)) ==
            reference_layer(config, slabs, input.hidden, input.ids, input.weights));
    }
}

TEST_CASE("A call without tokens, or without assignments, writes zeros", "[expert_ffn]") {
  const MoeConfig config = make_config(12, 20, 3, 2, DataType::f32);
  const auto slabs = random_slabs(config, 1);
  CpuFfn ffn(config, 2);
  CHECK(run_layer(ffn, slabs, random_input(config, 0, 1)).bytes.empty());

  LayerInput input = random_input(config, 4, 1);
  for (std::int64_t a = 0; a < 8; ++a) input.weights.set(a, 0);
  CHECK(values_of(run_layer(ffn, slabs, input)).norm() == 0);
}

TEST_CASE("Tokens that are not kept come out as zeros, whatever their rows hold", "[expert_ffn]") {
  const MoeConfig config = make_config(12, 20, 3, 2, DataType::f32);
  const auto slabs = random_slabs(config, 1);
  LayerInput input = random_input(config, 3, 1);
  for (std::int64_t i = 12; i < 24; ++i)
    input.hidden.set(i, std::numeric_limits<double>::quiet_NaN());
  input.ids.set(2, -1);
  const std::vector<std::uint8_t> keep = {1, 0, 1};
  const TokenGroups groups = group_tokens(input.ids.view(), input.weights.view(), 3, keep);
  CpuFfn ffn(config, 2);
  Tensor out = random_tensor({3, 12}, DataType::f32, 9);
  ffn.begin(input.hidden.view(), groups);
  ffn.compute(tasks_of(config, groups, slabs));
  ffn.combine(input.weights.view(), out.mutable_view());

  input.weights.set(2, 0);
  input.weights.set(3, 0);
  const Matrix expected = reference_layer(config, slabs, input.hidden, input.ids, input.weights);
  CHECK(relative_error(values_of(out), expected) <= 1e-5);
  CHECK(values_of(out).row(1).norm() == 0);
}

TEST_CASE("NaN in an expert or a token reaches only the tokens that use it", "[expert_ffn]") {
  for (const DataType dtype : storage_types)
    for (const Isa isa : machine_isas()) {
      const MoeConfig config = make_config(19, 21, 4, 1, dtype);
      auto slabs = random_slabs(config, 1);
      LayerInput input = random_input(config, 30, 2);
      for (std::int64_t t = 0; t < 30; ++t) input.ids.set(t, static_cast<double>(t % 3));
      CpuFfn ffn(config, 2, isa);
      const Matrix clean = values_of(run_layer(ffn, slabs, input));

      const double nan = std::numeric_limits<double>::quiet_NaN();
      const auto fill = [&](std::vector<std::byte>& bytes, std::int64_t first, std::int64_t last) {
        for (std::int64_t i = first; i < last; ++i) store(bytes.data(), dtype, i, nan);
      };
      const auto elements = static_cast<std::int64_t>(slabs[0].size() / size_of(dtype));
      fill(slabs[1], 0, elements);
      fill(slabs[3], 0, elements);
      fill(input.hidden.bytes, 5 * 19, 6 * 19);
      const Matrix got = values_of(run_layer(ffn, slabs, input));
      CAPTURE(name_of(dtype), name_of(isa));
      for (Eigen::Index t = 0; t < 30; ++t) {
        CAPTURE(t);
        if (t % 3 == 1 || t == 5)
          CHECK(got.row(t).array().isNaN().all());
        else
          CHECK(got.row(t) == clean.row(t));
      }
    }
}

TEST_CASE("NaN behind a weight row reaches no other column", "[expert_ffn]") {
  for (const DataType dtype : storage_types)
    for (const Isa isa : machine_isas()) {
      const MoeConfig config = make_config(19, 21, 1, 1, dtype);
      auto slabs = random_slabs(config, 1);
      const LayerInput input = random_input(config, 5, 2);
      CpuFfn ffn(config, 2, isa);
      const Matrix clean = values_of(run_layer(ffn, slabs, input));

      const auto spoil = [&](std::int64_t first, std::int64_t count) {
        for (std::int64_t i = first; i < first + count; ++i)
          store(slabs[0].data(), dtype, i, std::numeric_limits<double>::quiet_NaN());
      };
      const auto down = static_cast<std::int64_t>(SlabLayout(config).down_offset / size_of(dtype));
      spoil(down + 7 * 21, 21);  // one row of down: one column of the result
      slabs[0].resize((static_cast<std::size_t>(down) + 19 * 21 + 32) * size_of(dtype));
      spoil(down + 19 * 21, 32);
      const Matrix got = values_of(run_layer(ffn, slabs, input));
      CAPTURE(name_of(dtype), name_of(isa));
      for (Eigen::Index n = 0; n < 19; ++n) {
        CAPTURE(n);
        if (n == 7)
          CHECK(got.col(n).array().isNaN().all());
        else
          CHECK(got.col(n) == clean.col(n));
      }
    }
}

TEST_CASE("Instruction sets that this machine lacks are named, since nothing tests them here",
          "[expert_ffn]") {
  for (const Isa isa : {Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx_bf16})
    if (isa > best_isa()) WARN("not tested: this processor or system lacks " << name_of(isa));
  CHECK_THROWS_AS(CpuFfn(make_config(1, 1, 1, 1, DataType::bf16), 1, static_cast<Isa>(99)),
                  InvalidArgument);
}

TEST_CASE("What cannot be right is refused with a message that names it", "[expert_ffn]") {
  const MoeConfig config = make_config(12, 20, 3, 2, DataType::f32);
  const auto slabs = random_slabs(config, 1);
  const LayerInput input = random_input(config, 4, 1);
  const TokenGroups groups = group_tokens(input.ids.view(), input.weights.view(), 3);
  const auto tasks = tasks_of(config, groups, slabs);
  CpuFfn ffn(config, 1);
  Tensor out({4, 12}, DataType::f32);

  CHECK_THROWS_AS(CpuFfn(config, 0), InvalidArgument);
  CHECK_THROWS_AS(ffn.set_threads(-1), InvalidArgument);
  CHECK_THROWS_AS(CpuFfn(MoeConfig{}, 1), InvalidArgument);
  CHECK_THROWS_AS(ffn.compute(tasks), StateError);
  CHECK_THROWS_AS(ffn.combine(input.weights.view(), out.mutable_view()), StateError);
  CHECK_THROWS_AS(ffn.begin(Tensor({4, 11}, DataType::f32).view(), groups), InvalidArgument);
  CHECK_THROWS_AS(ffn.begin(Tensor({4, 12}, DataType::f16).view(), groups), InvalidArgument);
  CHECK_THROWS_AS(ffn.begin(Tensor({5, 12}, DataType::f32).view(), groups), InvalidArgument);

  ffn.begin(input.hidden.view(), groups);
  CHECK_THROWS_AS(ffn.combine(input.weights.view(), out.mutable_view()), StateError);
  const auto with = [&](auto change) {
    ExpertTask task = tasks[0];
    change(task);
    return std::vector<ExpertTask>{task};
  };
  CHECK_THROWS_AS(ffn.compute(with([](ExpertTask& task) { task.row_end = 9; })), InvalidArgument);
  CHECK_THROWS_AS(ffn.compute(with([](ExpertTask& task) { task.row_begin = -1; })),
                  InvalidArgument);
  CHECK_THROWS_AS(ffn.compute(with([](ExpertTask& task) { task.weights.up = nullptr; })),
                  InvalidArgument);
  CHECK_THROWS_AS(
      ffn.compute(with([](ExpertTask& task) { task.weights.up_bias = task.weights.up; })),
      InvalidArgument);
  ffn.compute(tasks);
  CHECK_THROWS_AS(ffn.compute(with([](ExpertTask&) {})), InvalidArgument);
  CHECK_THROWS_AS(ffn.combine(Tensor({4, 3}, DataType::f32).view(), out.mutable_view()),
                  InvalidArgument);
  CHECK_THROWS_AS(ffn.combine(input.weights.view(), Tensor({4, 12}, DataType::bf16).mutable_view()),
                  InvalidArgument);
  ffn.combine(input.weights.view(), out.mutable_view());
  CHECK_THROWS_AS(ffn.combine(input.weights.view(), out.mutable_view()), StateError);
}

TEST_CASE("Between calls at most 64 MiB of buffers are kept", "[expert_ffn]") {
  const MoeConfig config = make_config(1024, 8, 1, 1, DataType::f32);
  const auto slabs = random_slabs(config, 1);
  CpuFfn ffn(config, 1);
  run_layer(ffn, slabs, random_input(config, 100, 1));
  const std::size_t kept = ffn.workspace_bytes();
  CHECK(kept > 0);
  run_layer(ffn, slabs, random_input(config, 60, 1));
  CHECK(ffn.workspace_bytes() == kept);
  run_layer(ffn, slabs, random_input(config, 10000, 1));
  CHECK(ffn.workspace_bytes() <= std::size_t{64} << 20);
}

}  // namespace
}  // namespace sida::test
