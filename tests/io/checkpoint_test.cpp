// SPDX-License-Identifier: Apache-2.0
#include "sida/io/checkpoint.hpp"

#include <string>

#include "io/raw_safetensors.hpp"
#include "support/catch.hpp"
#include "support/temporary_folder.hpp"

using Catch::Matchers::ContainsSubstring;
using sida::Checkpoint;
using sida::IoError;

namespace {

std::string one_tensor(const std::string& name, float value) {
  return RawSafetensors().add(name, "F32", "[1]", std::vector<float>{value}).bytes();
}

float value_of(const Checkpoint& checkpoint, const std::string& name) {
  float value = 0;
  const sida::CheckpointTensor& found = checkpoint.tensors().at(name);
  found.file->read(found.tensor->begin, std::as_writable_bytes(std::span(&value, 1)));
  return value;
}

}  // namespace

TEST_CASE("A checkpoint is a file, or a folder with one") {
  const TemporaryFolder folder;
  folder.write("model.safetensors", one_tensor("a", 1));
  folder.write("other.safetensors", one_tensor("b", 2));
  CHECK(value_of(*Checkpoint::open(folder.path()), "a") == 1);
  CHECK(value_of(*Checkpoint::open(folder / "other.safetensors"), "b") == 2);
  CHECK(!Checkpoint::open(folder.path())->model_config());
}

TEST_CASE("Shards are found through the index, as links too") {
  const TemporaryFolder folder;
  const TemporaryFolder blobs;
  folder.write("model-00001-of-00002.safetensors", one_tensor("a", 1));
  std::filesystem::create_symlink(blobs.write("blob", one_tensor("b", 2)),
                                  folder / "model-00002-of-00002.safetensors");
  folder.write("model.safetensors.index.json",
               R"({"metadata":{"total_size":8},"weight_map":{
                   "a":"model-00001-of-00002.safetensors",
                   "b":"model-00002-of-00002.safetensors"}})");
  const auto checkpoint = Checkpoint::open(folder.path());
  CHECK(checkpoint->tensors().size() == 2);
  CHECK(value_of(*checkpoint, "a") == 1);
  CHECK(value_of(*checkpoint, "b") == 2);
}

TEST_CASE("An index that names what is not there, or not the folder's, is refused") {
  const TemporaryFolder folder;
  folder.write("x.safetensors", one_tensor("a", 1));
  std::filesystem::create_directory(folder / "inner");
  folder.write("inner/x.safetensors", one_tensor("a", 1));
  const auto check_refused = [&](const std::string& index, const char* reason) {
    folder.write("inner/model.safetensors.index.json", index);
    INFO(index.substr(0, 200));
    CHECK_THROWS_AS(Checkpoint::open(folder / "inner"), IoError);
    CHECK_THROWS_WITH(Checkpoint::open(folder / "inner"), ContainsSubstring(reason));
  };
  const auto map = [](const std::string& shard) {
    return R"({"weight_map":{"a":")" + shard + "\"}}";
  };
  check_refused(map("missing.safetensors"), "missing.safetensors");
  check_refused(map("../x.safetensors"), "own folder");
  check_refused(map("inner/../../x.safetensors"), "own folder");
  check_refused(map((folder / "x.safetensors").string()), "own folder");
  check_refused(map(""), "own folder");
  check_refused(map("."), "regular file");
  check_refused(R"({"weight_map":{"b":"x.safetensors"}})", "'b'");
  check_refused(R"({"weight_map":{"a":7}})", "'a'");
  check_refused(R"({"weight_map":["a"]})", "weight_map");
  check_refused(R"({"weights":{}})", "weight_map");
  check_refused("[1]", "weight_map");
  check_refused(R"({"weight_map":{"a":"x.safetensors","a":"y.safetensors"}})", "twice");
  check_refused(std::string(5000, '['), "nested");
  CHECK_THROWS_WITH(Checkpoint::open(folder.path()),
                    ContainsSubstring("model.safetensors.index.json"));
  CHECK_THROWS_WITH(Checkpoint::open(folder / "none"), ContainsSubstring("cannot open"));
}

TEST_CASE("config.json gives what sida needs of it, from a text model inside too") {
  const TemporaryFolder folder;
  const auto read = [&](const std::string& text) {
    return sida::read_model_config(folder.write("config.json", text));
  };
  const auto qwen = read(R"({"model_type":"qwen3_moe","hidden_size":2048,"hidden_act":"silu",
                             "num_experts_per_tok":8})");
  CHECK(qwen.model_type == "qwen3_moe");
  CHECK(qwen.hidden_size == 2048);
  CHECK(qwen.activation == "silu");
  CHECK(qwen.top_k == 8);
  const auto t5 =
      read(R"({"model_type":"switch_transformers","d_model":768,"dense_act_fn":"relu"})");
  CHECK(t5.hidden_size == 768);
  CHECK(t5.activation == "relu");
  CHECK(!t5.top_k);
  const auto inner = read(R"({"model_type":"x","text_config":{"hidden_size":64,"hidden_act":"gelu",
                              "num_experts_per_tok":null,"text_config":{"d_model":1}}})");
  CHECK(!inner.swiglu_limit);
  CHECK(read(R"({"text_config":{"swiglu_limit":10.5}})").swiglu_limit == 10.5f);
  CHECK(inner.hidden_size == 64);
  CHECK(inner.activation == "gelu");
  CHECK(!inner.top_k);
  for (const char* bad :
       {"[]", "{", R"({"hidden_size":-1})", R"({"hidden_size":"768"})",
        R"({"hidden_size":4294967296})", R"({"num_experts_per_tok":0})", R"({"hidden_act":7})",
        R"({"swiglu_limit":0})", R"({"swiglu_limit":"7"})", R"({"model_type":["a"]})"})
    CHECK_THROWS_AS(read(bad), IoError);
  using sida::Activation;
  CHECK(sida::transformers_activation("gelu") == Activation::gelu);
  CHECK(sida::transformers_activation("gelu_new") == Activation::gelu_tanh);
  CHECK(sida::transformers_activation("gelu_pytorch_tanh") == Activation::gelu_tanh);
  CHECK(sida::transformers_activation("swish") == Activation::silu);
  CHECK(sida::transformers_activation("relu2") == Activation::relu2);
  CHECK(!sida::transformers_activation("mish"));
}
