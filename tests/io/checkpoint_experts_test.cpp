// SPDX-License-Identifier: Apache-2.0
#include "sida/io/checkpoint_experts.hpp"

#include <algorithm>
#include <string>
#include <vector>

#include "io/checkpoint_files.hpp"
#include "support/catch.hpp"
#include "support/temporary_folder.hpp"

using Catch::Matchers::ContainsSubstring;
using sida::Activation;
using sida::CheckpointExperts;
using sida::ExpertSearch;
using sida::InvalidArgument;

namespace {

using Names = std::vector<std::string>;

CheckpointExperts find(const ToyCheckpoint& checkpoint, const ExpertSearch& search = {},
                       const char* config_json = nullptr) {
  const TemporaryFolder folder;
  folder.write("model.safetensors", checkpoint.raw.bytes());
  if (config_json) folder.write("config.json", config_json);
  return sida::find_experts(*sida::Checkpoint::open(folder.path()), search);
}

void check_refused(const ToyCheckpoint& checkpoint, const std::string& reason,
                   const ExpertSearch& search = {}, const char* config_json = nullptr) {
  CHECK_THROWS_AS(find(checkpoint, search, config_json), InvalidArgument);
  CHECK_THROWS_WITH(find(checkpoint, search, config_json), ContainsSubstring(reason));
}

ToyCheckpoint switch_layers(const Names& layers, ToyModel model = {.gated = false}) {
  ToyCheckpoint checkpoint(model);
  for (const std::string& layer : layers)
    checkpoint.add_separate(0, layer, "expert_", "", "wi", "wo");
  return checkpoint;
}

ToyCheckpoint stacked_layer(ToyModel model, bool transposed = false) {
  ToyCheckpoint checkpoint(model);
  checkpoint.add_stacked(0, "m", transposed);
  return checkpoint;
}

}  // namespace

TEST_CASE("Layers come in model order: encoder before decoder, numbers by value") {
  const Names order{"encoder.block.1.layer.1.mlp", "encoder.block.3.layer.1.mlp",
                    "encoder.block.11.layer.1.mlp", "decoder.block.1.layer.2.mlp",
                    "decoder.block.10.layer.2.mlp"};
  Names shuffled = order;
  std::reverse(shuffled.begin(), shuffled.end());
  const auto experts = find(switch_layers(shuffled));
  CHECK(experts.layer_names == order);
  CHECK(experts.layout == "switch_transformers");
  CHECK(experts.config.layers == 5);
  CHECK(experts.config.experts == 3);
  CHECK(experts.tensors.size() == 15);
  // A chain a < b < c < a of names would make sorting undefined.
  const Names ordered{"2", "10", "encoder", "decoder", "1a", "dz", "x"};
  for (std::size_t i = 0; i < ordered.size(); ++i)
    for (std::size_t j = 0; j < ordered.size(); ++j)
      CHECK(sida::layer_before(ordered[i], ordered[j]) == (i < j));
}

TEST_CASE("Named layers are taken in the caller's order, others are not looked at") {
  ToyCheckpoint checkpoint = switch_layers({"a.1", "a.2", "a.3"});
  checkpoint.add_other("b.experts.0.lora_A.weight");
  CHECK(find(checkpoint, {.layers = {"a.3", "a.1"}}).layer_names == Names{"a.3", "a.1"});
  check_refused(checkpoint, "lora_A");
  check_refused(checkpoint, "'a.4'", {.layers = {"a.1", "a.4"}});
  check_refused(checkpoint, "'a.1'", {.layers = {"a.1", "a.1"}});
}

TEST_CASE("A module of experts at the root has the empty name") {
  ToyCheckpoint checkpoint(ToyModel{});
  checkpoint.matrix(
      "experts.gate_up_proj", 10, 4, [](int, int) { return 1; }, 3);
  checkpoint.matrix(
      "experts.down_proj", 4, 5, [](int, int) { return 1; }, 3);
  const auto experts = find(checkpoint);
  CHECK(experts.layer_names == Names{""});
  CHECK(experts.layout == "stacked");
}

TEST_CASE("Activation and top_k come from the config, or are the usual ones") {
  const auto separate = switch_layers({"m"});
  const auto gated = stacked_layer({});
  CHECK(find(separate).config.activation == Activation::relu);
  CHECK(find(gated).config.activation == Activation::silu);
  CHECK(find(gated).config.top_k == 1);
  CHECK(find(separate, {}, R"({"dense_act_fn":"gelu"})").config.activation == Activation::gelu);
  const auto config =
      find(gated, {}, R"({"hidden_act":"gelu_pytorch_tanh","num_experts_per_tok":3})").config;
  CHECK(config.activation == Activation::gelu_tanh);
  CHECK(config.top_k == 3);
  CHECK(find(separate, {}, R"({"dense_act_fn":"relu2"})").config.activation == Activation::relu2);
  const auto clamped =
      find(gated, {}, R"({"hidden_act":"silu","num_experts_per_tok":3,"swiglu_limit":10})").config;
  CHECK(clamped.activation == Activation::silu_clamped);
  CHECK(clamped.limit == 10);
  check_refused(gated, "mish", {}, R"({"hidden_act":"mish","num_experts_per_tok":3})");
  check_refused(gated, "hidden_act", {}, R"({"num_experts_per_tok":3})");
  check_refused(gated, "num_experts_per_tok", {}, R"({"hidden_act":"silu"})");
  check_refused(gated, "top_k", {}, R"({"hidden_act":"silu","num_experts_per_tok":4})");
  check_refused(gated, "take turns", {}, R"({"model_type":"gpt_oss"})");
}

TEST_CASE("A given config is checked against the tensors and says the rest") {
  sida::MoeConfig config{.layers = 1,
                         .experts = 3,
                         .hidden_size = 4,
                         .intermediate_size = 5,
                         .top_k = 2,
                         .activation = Activation::gelu,
                         .gated = true,
                         .dtype = sida::DataType::bf16};
  const auto checkpoint = stacked_layer({});
  CHECK(find(checkpoint, {.config = config}).config == config);
  CHECK(find(checkpoint, {.config = config}, R"({"hidden_act":"mish"})").config == config);
  CHECK(find(checkpoint, {.config = config, .dtype = sida::DataType::f16}).config.dtype ==
        sida::DataType::f16);
  config.experts = 4;
  check_refused(checkpoint, "4 experts", {.config = config});
  config.experts = 3;
  config.down_bias = true;
  check_refused(checkpoint, "down_bias", {.config = config});
}

TEST_CASE("Stacked experts that may be transposed are told apart or asked about") {
  const char* config = R"({"hidden_size":4,"hidden_act":"relu","num_experts_per_tok":1})";
  const ToyModel plain{.gated = false};
  check_refused(stacked_layer(plain), "MoeConfig");
  CHECK(find(stacked_layer(plain), {}, config).layout == "stacked");
  CHECK(find(stacked_layer(plain, true), {}, config).layout == "stacked, transposed");
  const ToyModel square{.intermediate = 4, .gated = false};
  check_refused(stacked_layer(square), "MoeConfig", {}, config);
  const sida::MoeConfig known{.layers = 1, .experts = 3, .hidden_size = 4, .intermediate_size = 4};
  CHECK(find(stacked_layer(square), {.config = known}).layout == "stacked");
  // gated tensors tell by themselves
  CHECK(find(stacked_layer({})).layout == "stacked");
  CHECK(find(stacked_layer({}, true)).layout == "stacked, transposed");
  CHECK(find(stacked_layer({}, true)).config.hidden_size == 4);
  CHECK(find(stacked_layer({.intermediate = 2})).layout == "stacked");
  CHECK(find(stacked_layer({.intermediate = 2}, true)).layout == "stacked, transposed");
}

TEST_CASE("Experts that do not fit together are refused by what is wrong") {
  const auto number = [](int, int) { return 1; };
  SECTION("no experts") {
    ToyCheckpoint checkpoint{ToyModel{}};
    checkpoint.add_other("mlp.wi.weight");
    check_refused(checkpoint, "MoE layers");
  }
  SECTION("a layer of another shape") {
    ToyCheckpoint checkpoint = switch_layers({"m.1"});
    checkpoint.model.hidden = 6;
    checkpoint.add_separate(0, "m.2", "expert_", "", "wi", "wo");
    check_refused(checkpoint, "'m.2'");
  }
  SECTION("a layer of another layout") {
    ToyCheckpoint checkpoint = switch_layers({"m.1"});
    checkpoint.add_separate(0, "m.2", "", "", "up_proj", "down_proj");
    check_refused(checkpoint, "'m.2'");
  }
  SECTION("two layouts in one layer") {
    ToyCheckpoint checkpoint = switch_layers({"m.1"});
    checkpoint.matrix("m.1.experts.0.up_proj.weight", 5, 4, number);
    check_refused(checkpoint, "m.1.experts.");
  }
  SECTION("an expert is missing") {
    ToyCheckpoint checkpoint = switch_layers({"m"});
    checkpoint.matrix("m.experts.expert_4.wi.weight", 5, 4, number);
    checkpoint.matrix("m.experts.expert_4.wo.weight", 4, 5, number);
    check_refused(checkpoint, "expert 3");
  }
  SECTION("a matrix is missing") {
    ToyCheckpoint checkpoint = switch_layers({"m"});
    checkpoint.matrix("m.experts.expert_3.wi.weight", 5, 4, number);
    check_refused(checkpoint, "down matrix of expert 3");
  }
  SECTION("one expert has a bias") {
    ToyCheckpoint checkpoint = switch_layers({"m"});
    checkpoint.vector("m.experts.expert_1.wi.bias", 5, [](int) { return 1; });
    check_refused(checkpoint, "same tensors");
  }
  SECTION("one expert has another shape") {
    ToyCheckpoint checkpoint = switch_layers({"m"});
    checkpoint.matrix("m.experts.expert_3.wi.weight", 4, 5, number);
    checkpoint.matrix("m.experts.expert_3.wo.weight", 5, 4, number);
    check_refused(checkpoint, "expected shape [5, 4], got [4, 5]");
  }
  SECTION("stacked tensors of shapes that do not fit") {
    ToyCheckpoint checkpoint{ToyModel{}};
    checkpoint.matrix("m.experts.gate_up_proj", 10, 4, number, 3);
    checkpoint.matrix("m.experts.down_proj", 4, 6, number, 3);
    check_refused(checkpoint, "[E, 2I, H]");
  }
  SECTION("stacked tensors of different numbers of experts") {
    ToyCheckpoint checkpoint{ToyModel{}};
    checkpoint.matrix("m.experts.gate_up_proj", 10, 4, number, 3);
    checkpoint.matrix("m.experts.down_proj", 4, 5, number, 2);
    check_refused(checkpoint, "expected shape [3, 4, 5], got [2, 4, 5]");
  }
  SECTION("a stacked tensor of two dimensions") {
    ToyCheckpoint checkpoint{ToyModel{}};
    checkpoint.matrix("m.experts.gate_up_proj", 10, 4, number);
    checkpoint.matrix("m.experts.down_proj", 4, 5, number, 2);
    check_refused(checkpoint, "3 dimensions");
  }
  SECTION("sizes of zero") {
    ToyCheckpoint checkpoint{ToyModel{}};
    checkpoint.raw.add("m.experts.gate_up_proj", "F32", "[2147483647,0,4]", std::vector<float>{})
        .add("m.experts.down_proj", "F32", "[2147483647,4,0]", std::vector<float>{});
    check_refused(checkpoint, "65536");
    check_refused(stacked_layer({.hidden = 0}), "hidden_size");
    check_refused(stacked_layer({.experts = 0}), "experts");
  }
  SECTION("quantised") {
    ToyCheckpoint checkpoint{ToyModel{}};
    checkpoint.raw.add("m.experts.0.w1.weight", "F8_E4M3", "[1,1]", std::vector<char>{1})
        .add("m.experts.0.w3.weight", "F8_E4M3", "[1,1]", std::vector<char>{1})
        .add("m.experts.0.w2.weight", "F8_E4M3", "[1,1]", std::vector<char>{1});
    check_refused(checkpoint, "F8_E4M3");
    check_refused(checkpoint, "'m.experts.0.w1.weight_scale_inv'");
  }
  SECTION("two dtypes") {
    ToyCheckpoint checkpoint = switch_layers({"m"});
    checkpoint.dtype = "BF16";
    checkpoint.matrix("m.experts.expert_3.wi.weight", 5, 4, number);
    checkpoint.matrix("m.experts.expert_3.wo.weight", 4, 5, number);
    check_refused(checkpoint, "dtype");
    CHECK(find(checkpoint, {.dtype = sida::DataType::f32}).config.experts == 4);
  }
  SECTION("a dtype that no expert can have") {
    check_refused(switch_layers({"m"}), "dtype", {.dtype = sida::DataType::i32});
  }
  SECTION("names that only look like an expert's") {
    for (const char* name :
         {"m.experts.expert_01.wi.weight", "m.experts.-1.w1.weight", "m.experts.expert_0.w1.weight",
          "m.experts.0.wi.weight", "m.experts.99999999999.w1.weight", "m.experts..w1.weight",
          "m.experts.gate_up_proj_codes", "m.experts.0.w1.weight.x"}) {
      ToyCheckpoint checkpoint{ToyModel{}};
      checkpoint.add_other(name);
      check_refused(checkpoint, name);
    }
  }
}
