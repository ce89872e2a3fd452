// SPDX-License-Identifier: Apache-2.0
#include "sida/io/checkpoint_store.hpp"

#include <atomic>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "io/checkpoint_files.hpp"
#include "support/catch.hpp"
#include "support/temporary_folder.hpp"

using sida::Activation;
using sida::CheckpointStore;
using sida::DataType;
using sida::ExpertId;

namespace {

std::string read(sida::ExpertStore& store, ExpertId id, std::size_t offset, std::size_t count) {
  std::string bytes(count, '?');
  store.read(id, offset, std::as_writable_bytes(std::span(bytes)));
  return bytes;
}

/// The layouts, with the layers' names out of order in the file.
ToyCheckpoint write_layout(const std::string& layout, ToyModel model, const std::string& dtype) {
  ToyCheckpoint checkpoint(model, dtype);
  checkpoint.add_other("lm_head.weight");
  checkpoint.add_other("model.layers.2.mlp.shared_experts.up_proj.weight");
  checkpoint.add_other("model.layers.2.mlp.router.weight");
  for (int layer = model.layers - 1; layer >= 0; --layer) {
    const std::string prefix =
        "model.layers." + std::to_string(layer == 0 ? 2 : 9 + layer) + ".mlp";
    if (layout == "switch")
      checkpoint.add_separate(layer, prefix, "expert_", "", "wi", "wo");
    else if (layout == "per_expert")
      checkpoint.add_separate(layer, prefix, "", "gate_proj", "up_proj", "down_proj");
    else if (layout == "mixtral")
      checkpoint.add_separate(layer, prefix, "", "w1", "w3", "w2");
    else
      checkpoint.add_stacked(layer, prefix, layout != "stacked", layout == "interleaved");
  }
  return checkpoint;
}

const char* safetensors_dtype(DataType type) {
  return type == DataType::f32    ? "F32"
         : type == DataType::f16  ? "F16"
         : type == DataType::bf16 ? "BF16"
                                  : "F64";
}

/// Every expert, whole and in ranges that begin and end anywhere, is the model's own slab.
void check_slabs(CheckpointStore& store, const ToyModel& model, DataType type) {
  REQUIRE(store.layers() == model.layers);
  REQUIRE(store.experts() == model.experts);
  for (int layer = 0; layer < model.layers; ++layer) {
    for (int expert = 0; expert < model.experts; ++expert) {
      const std::string slab = model.slab(layer, expert, safetensors_dtype(type));
      REQUIRE(store.slab_bytes() == slab.size());
      REQUIRE(read(store, {layer, expert}, 0, slab.size()) == slab);
      bool same = true;
      for (std::size_t offset = 0; offset < slab.size(); offset += 5) {
        for (const std::size_t count : {0, 1, 2, 3, 7, 41, 130, 257}) {
          const std::string part = slab.substr(offset, count);
          same = same && read(store, {layer, expert}, offset, part.size()) == part;
        }
      }
      CHECK(same);
    }
  }
}

}  // namespace

TEST_CASE("Every layout of a checkpoint gives the same slabs, read in any ranges") {
  struct Case {
    const char* layout;
    bool gated;
    bool bias;
  };
  const TemporaryFolder folder;
  for (const Case& test : std::vector<Case>{{"switch", false, false},
                                            {"switch", false, true},
                                            {"per_expert", true, false},
                                            {"per_expert", true, true},
                                            {"per_expert", false, false},
                                            {"mixtral", true, false},
                                            {"stacked", true, false},
                                            {"stacked", true, true},
                                            {"stacked", false, true},
                                            {"transposed", true, false},
                                            {"transposed", true, true},
                                            {"transposed", false, true},
                                            {"interleaved", true, false},
                                            {"interleaved", true, true}}) {
    const ToyModel model{.gated = test.gated, .bias = test.bias};
    for (const char* dtype : {"F32", "BF16", "F16", "F64"}) {
      INFO(test.layout << " " << dtype << " gated " << test.gated << " bias " << test.bias);
      const auto path =
          folder.write("model.safetensors", write_layout(test.layout, model, dtype).raw.bytes());
      folder.write("config.json", R"({"hidden_size": 4, "hidden_act": "gelu_new",
                                      "num_experts_per_tok": 2})");
      for (const DataType type : {DataType::f32, DataType::bf16, DataType::f16}) {
        const bool turns = test.layout == std::string("interleaved");
        const auto store = CheckpointStore::open(path, {.dtype = type, .interleaved = turns});
        INFO("as " << name_of(type));
        check_slabs(*store, model, type);
        const sida::MoeConfig& config = store->config();
        CHECK(config.hidden_size == 4);
        CHECK(config.intermediate_size == 5);
        CHECK(config.gated == test.gated);
        CHECK(config.up_bias == test.bias);
        CHECK(config.down_bias == test.bias);
        CHECK(config.dtype == type);
        CHECK(config.activation == Activation::gelu_tanh);
        CHECK(config.top_k == (test.layout == std::string("switch") ? 1 : 2));
        CHECK(store->layer_names() ==
              std::vector<std::string>{"model.layers.2.mlp", "model.layers.10.mlp"});
        const bool plain = dtype == std::string(safetensors_dtype(type)) &&
                           test.layout != std::string("transposed") && !turns;
        CHECK((store->staging_bytes() == 0) == plain);
        CHECK(store->staging_bytes() <= store->slab_bytes());
      }
    }
  }
}

TEST_CASE("Without a dtype slabs have the checkpoint's own") {
  const TemporaryFolder folder;
  for (const DataType type : {DataType::f32, DataType::bf16, DataType::f16, DataType::f64}) {
    const ToyModel model;
    const auto path = folder.write(
        "model.safetensors", write_layout("stacked", model, safetensors_dtype(type)).raw.bytes());
    const auto store = CheckpointStore::open(path);
    CHECK(store->config().dtype == type);
    CHECK(store->staging_bytes() == 0);
    check_slabs(*store, model, type);
  }
}

TEST_CASE("Numbers that another dtype lacks are rounded to the nearest, ties to even") {
  const TemporaryFolder folder;
  // One expert of hidden size 2 and intermediate size 1; bf16 neighbours of 1 are 1/128 apart.
  const std::vector<float> up{1.0f + 1.0f / 256, 1.0f + 3.0f / 256};
  const std::vector<float> down{-1.0f - 1.001f / 256, 3e38f};
  const auto path =
      folder.write("x.safetensors", RawSafetensors()
                                        .add("m.experts.up_proj", "F32", "[1,1,2]", up)
                                        .add("m.experts.down_proj", "F32", "[1,2,1]", down)
                                        .bytes());
  const sida::MoeConfig config{
      .layers = 1, .experts = 1, .hidden_size = 2, .intermediate_size = 1, .dtype = DataType::bf16};
  const auto store = CheckpointStore::open(path, {.config = config});
  CHECK(read(*store, {0, 0}, 0, 4) == bytes_of(std::vector<std::uint16_t>{0x3f80, 0x3f82}));
  CHECK(read(*store, {0, 0}, 128, 2) == bytes_of(std::vector<std::uint16_t>{0xbf81}));
}

TEST_CASE("A tensor larger than the conversion buffer goes through it piece by piece") {
  const TemporaryFolder folder;
  // [7, 11] stored plain and transposed as f64: the smallest buffer holds 8 of its 77 elements.
  std::vector<double> plain, transposed;
  std::vector<std::int16_t> expected;
  for (int r = 0; r < 7; ++r)
    for (int c = 0; c < 11; ++c) plain.push_back(r * 11 + c);
  for (int c = 0; c < 11; ++c)
    for (int r = 0; r < 7; ++r) transposed.push_back(r * 11 + c);
  const auto path = folder.write("x", RawSafetensors()
                                          .add("plain", "F64", "[7,11]", plain)
                                          .add("transposed", "F64", "[11,7]", transposed)
                                          .bytes());
  const auto file = sida::SafetensorsFile::open(path);
  std::string slab;
  for (int i = 0; i < 77; ++i) slab += ToyModel::element(i, "BF16");
  sida::ConvertingReader reader(DataType::bf16, 1);
  REQUIRE(reader.buffer_bytes() == 64);
  for (const char* name : {"plain", "transposed"}) {
    const bool is_transposed = name == std::string("transposed");
    const sida::ExpertTensor tensor{.rows = 7,
                                    .columns = 11,
                                    .transposed = is_transposed,
                                    .stride = is_transposed ? 7 : 11,
                                    .type = DataType::f64,
                                    .file = &file,
                                    .begin = file.tensor(name).begin};
    bool same = true;
    for (std::size_t offset = 0; offset <= slab.size(); ++offset) {
      for (std::size_t count = 0; offset + count <= slab.size(); ++count) {
        std::string part(count, '?');
        reader.read(tensor, offset, std::as_writable_bytes(std::span(part)));
        same = same && part == slab.substr(offset, count);
      }
    }
    INFO(name);
    CHECK(same);
  }
}

TEST_CASE("Threads that read one checkpoint at once get what one thread gets") {
  const TemporaryFolder folder;
  const ToyModel model{.experts = 6, .hidden = 12, .intermediate = 9};
  for (const std::string layout : {"stacked", "transposed"}) {
    const auto path =
        folder.write("model.safetensors", write_layout(layout, model, "F32").raw.bytes());
    const auto store = CheckpointStore::open(
        path, {.dtype = layout == "stacked" ? DataType::f32 : DataType::bf16});
    std::atomic<int> wrong{0};
    std::vector<std::thread> threads;
    for (unsigned t = 0; t < 8; ++t) {
      threads.emplace_back([&, t] {
        std::mt19937 random(t);
        for (int i = 0; i < 200; ++i) {
          const int layer = static_cast<int>(random() % 2), expert = static_cast<int>(random() % 6);
          const std::string slab = model.slab(layer, expert, layout == "stacked" ? "F32" : "BF16");
          const std::size_t offset = random() % slab.size();
          const std::size_t count = random() % (slab.size() - offset + 1);
          if (read(*store, {layer, expert}, offset, count) != slab.substr(offset, count)) ++wrong;
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    CHECK(wrong == 0);
  }
}

TEST_CASE("What a checkpoint store does not have is refused, and a file that shrinks is an error") {
  const TemporaryFolder folder;
  const ToyModel model;
  const auto path =
      folder.write("model.safetensors", write_layout("stacked", model, "F32").raw.bytes());
  const auto store = CheckpointStore::open(path);
  CHECK_THROWS_AS(read(*store, {2, 0}, 0, 1), sida::OutOfRange);
  CHECK_THROWS_AS(read(*store, {0, 3}, 0, 1), sida::OutOfRange);
  CHECK_THROWS_AS(read(*store, {-1, 0}, 0, 1), sida::OutOfRange);
  CHECK_THROWS_AS(read(*store, {0, 0}, 1, store->slab_bytes()), sida::OutOfRange);
  std::filesystem::resize_file(path, 100);
  CHECK_THROWS_AS(read(*store, {1, 2}, 0, 64), sida::IoError);
}
