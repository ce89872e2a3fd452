// SPDX-License-Identifier: Apache-2.0
//
// Feeds damaged files to sida's readers: fuzz_files FORMAT RUNS [SEED]. A reader may refuse a file
// with IoError or InvalidArgument or read it; anything else (another exception, a sanitizer's
// report, a crash) is a failure, and the seed that led there is printed. Build with the preset
// `asan` to give it eyes.
#include <sys/mman.h>
#include <unistd.h>

#include <charconv>
#include <exception>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "fuzz/mutate.hpp"
#include "io/raw_safetensors.hpp"
#include "sida/hash/hash_predictor_cpu.hpp"
#include "sida/io.hpp"
#include "support/temporary_folder.hpp"

namespace {

/// A file in memory that can be opened by path.
class MemoryFile {
 public:
  MemoryFile() : descriptor_(::memfd_create("fuzz", MFD_CLOEXEC)) {
    if (descriptor_ < 0) throw std::runtime_error("memfd_create failed");
  }
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;
  ~MemoryFile() { ::close(descriptor_); }

  std::filesystem::path path() const { return "/proc/self/fd/" + std::to_string(descriptor_); }
  void set(const std::string& content) {
    if (::ftruncate(descriptor_, 0) != 0 || ::pwrite(descriptor_, content.data(), content.size(),
                                                     0) != static_cast<::ssize_t>(content.size()))
      throw std::runtime_error("cannot write the file in memory");
  }

 private:
  int descriptor_;
};

std::string content_of(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

/// A format: a valid file to begin with, and what a user does with it.
struct Format {
  std::string valid;
  std::function<void(const std::filesystem::path&)> read;
};

std::vector<std::byte> zeros(std::size_t bytes) { return std::vector<std::byte>(bytes); }

Format safetensors(const std::filesystem::path& folder) {
  const auto data = zeros(64);
  sida::write_safetensors(folder / "valid",
                          {{"a", sida::DataType::f32, {2, 4}, std::span(data).first(32)},
                           {"b", sida::DataType::bf16, {16}, std::span(data).first(32)},
                           {"empty", sida::DataType::i64, {0, 3}, {}}},
                          {{"format", "pt"}});
  return {content_of(folder / "valid"), [](const auto& path) {
            const auto file = sida::SafetensorsFile::open(path);
            for (const auto& [name, tensor] : file.tensors()) {
              std::vector<std::byte> bytes(tensor.end - tensor.begin);
              file.read(tensor.begin, bytes);
            }
          }};
}

Format hash_table(const std::filesystem::path& folder) {
  sida::HashTable table;
  table.layers = 2;
  table.candidates = 3;
  table.keys = {7, 9};
  table.offsets = {0, 2, 5};
  table.ids.assign(30, 1);
  table.probs.assign(30, 0.5f);
  table.scale.assign(30, 0.5f);
  sida::save_hash_table(folder / "valid", table);
  return {content_of(folder / "valid"), [](const auto& path) {
            const auto read = sida::load_hash_table(path);
            if (read.ids.size() != read.index(read.layers, 0, 0))
              throw std::logic_error("ids do not fit the table");
          }};
}

Format predictor(const std::filesystem::path& folder) {
  const std::vector<float> values(3 * 4 * 2, 0.25f);
  const auto bytes = [&](std::size_t count) {
    return std::as_bytes(std::span(values).first(count));
  };
  sida::write_safetensors(folder / "valid",
                          {{"compress.weight", sida::DataType::f32, {2, 3}, bytes(6)},
                           {"compress.bias", sida::DataType::f32, {2}, bytes(2)},
                           {"routing.weight", sida::DataType::f32, {8, 2}, bytes(16)},
                           {"routing.bias", sida::DataType::f32, {8}, bytes(8)},
                           {"scale.weight", sida::DataType::f32, {8, 2}, bytes(16)},
                           {"scale.bias", sida::DataType::f32, {8}, bytes(8)}},
                          {{"format", "sida-predictor"},
                           {"version", "1"},
                           {"kind", "token"},
                           {"layers", "3"},
                           {"heads", "0,2"},
                           {"experts", "4"},
                           {"embedding_size", "3"},
                           {"hidden_size", "2"},
                           {"scale_factor", "1.0"},
                           {"fingerprint", "f"}});
  return {content_of(folder / "valid"), [](const auto& path) {
            const sida::HashPredictor<sida::CpuBackend> predictor(sida::load_predictor(path));
            const std::vector<float> embeddings(
                static_cast<std::size_t>(std::min(predictor.weights().embedding_size, 1024)) * 2);
            if (predictor.weights().embedding_size > 1024) return;
            predictor.predict({std::as_bytes(std::span(embeddings)).data(),
                               sida::DataType::f32,
                               {1, 2, predictor.weights().embedding_size}},
                              {}, 1);
          }};
}

Format kernel_table(const std::filesystem::path&) {
  return {R"({"format": "sida-kernels", "gpu": "GPU", "choices": [
              {"dtype": "bf16", "gated": true, "top_k": 8, "experts": 128, "hidden_size": 2048,
               "intermediate_size": 768, "tokens": 64, "kernel": "narrow"}]})",
          [](const auto& path) {
            for (const sida::KernelChoice& choice : sida::load_kernel_table(path).choices)
              if (choice.tokens < 1) throw std::logic_error("a call of no tokens");
          }};
}

/// A checkpoint is a folder; what is damaged is one of its files, beside which the others stay
/// whole.
Format checkpoint(const std::filesystem::path& folder, const std::string& damaged) {
  const auto data = zeros(8 * 4 * 4);
  std::vector<sida::SafetensorsEntry> tensors;
  for (const char* expert : {"0", "1"}) {
    const std::string prefix = std::string("encoder.block.1.layer.1.mlp.experts.expert_") + expert;
    tensors.push_back({prefix + ".wi.weight", sida::DataType::f32, {8, 4}, data});
    tensors.push_back({prefix + ".wo.weight", sida::DataType::f32, {4, 8}, data});
  }
  sida::write_safetensors(folder / "shard.safetensors", tensors);
  std::string map;
  for (const auto& tensor : tensors)
    map += (map.empty() ? "\"" : ",\"") + tensor.name + "\":\"shard.safetensors\"";
  std::ofstream(folder / "model.safetensors.index.json")
      << R"({"metadata":{"total_size":512},"weight_map":{)" + map + "}}";
  std::ofstream(folder / "config.json")
      << R"({"model_type":"switch_transformers","d_model":4,"d_ff":8,"num_experts":2,"dense_act_fn":"relu"})";
  return {content_of(folder / damaged), [folder, damaged](const auto& path) {
            std::filesystem::remove(folder / damaged);
            std::filesystem::copy_file(path, folder / damaged);
            sida::CheckpointStore store(sida::Checkpoint::open(folder));
            std::vector<std::byte> slab(std::min<std::size_t>(store.slab_bytes(), 1 << 20));
            store.read({0, 0}, 0, slab);
          }};
}

/// A checkpoint of packed experts, of which the file with the weights is damaged.
Format packed(const std::filesystem::path& folder, const RawSafetensors& raw, const char* config) {
  std::ofstream(folder / "config.json") << config;
  return {raw.bytes(), [folder](const auto& path) {
            std::filesystem::remove(folder / "model.safetensors");
            std::filesystem::copy_file(path, folder / "model.safetensors");
            sida::CheckpointStore store(sida::Checkpoint::open(folder));
            std::vector<std::byte> slab(std::min<std::size_t>(store.slab_bytes(), 1 << 20));
            store.read({0, 0}, 0, slab);
          }};
}

Format fp8(const std::filesystem::path& folder) {
  RawSafetensors raw;
  const std::vector<std::uint8_t> codes(8 * 4, 0x38);
  for (const char* matrix : {"gate_proj", "up_proj", "down_proj"}) {
    const std::string name = std::string("m.experts.0.") + matrix + ".weight";
    const bool down = matrix == std::string("down_proj");
    raw.add(name, "F8_E4M3", down ? "[4,8]" : "[8,4]", codes)
        .add(name + "_scale_inv", "F32", down ? "[1,2]" : "[2,1]", std::vector<float>(2, 0.5f));
  }
  return packed(folder, raw, R"({"hidden_act":"silu","num_experts_per_tok":1,
      "quantization_config":{"quant_method":"fp8","weight_block_size":[4,4]}})");
}

Format mxfp4(const std::filesystem::path& folder) {
  RawSafetensors raw;
  const auto bytes = [](std::size_t count) { return std::vector<std::uint8_t>(count, 0x7f); };
  raw.add("m.experts.gate_up_proj_blocks", "U8", "[1,64,1,16]", bytes(1024))
      .add("m.experts.gate_up_proj_scales", "U8", "[1,64,1]", bytes(64))
      .add("m.experts.down_proj_blocks", "U8", "[1,32,1,16]", bytes(512))
      .add("m.experts.down_proj_scales", "U8", "[1,32,1]", bytes(32));
  return packed(folder, raw, R"({"model_type":"gpt_oss","num_experts_per_tok":1})");
}

Format make(const std::string& name, const std::filesystem::path& folder) {
  if (name == "safetensors") return safetensors(folder);
  if (name == "hash-table") return hash_table(folder);
  if (name == "predictor") return predictor(folder);
  if (name == "kernel-table") return kernel_table(folder);
  if (name == "config") return checkpoint(folder, "config.json");
  if (name == "index") return checkpoint(folder, "model.safetensors.index.json");
  if (name == "fp8") return fp8(folder);
  if (name == "mxfp4") return mxfp4(folder);
  throw std::invalid_argument(
      "expected safetensors, hash-table, predictor, config, index, fp8, mxfp4 or kernel-table; "
      "got " +
      name);
}

int run(const std::string& name, std::uint64_t runs, std::uint64_t seed) {
  const TemporaryFolder folder;
  const Format format = make(name, folder.path());
  MemoryFile file;
  file.set(format.valid);
  format.read(file.path());  // the file to begin with is a good one
  std::uint64_t refused = 0;
  for (std::uint64_t i = 0; i < runs; ++i) {
    file.set(fuzz::Mutator(seed + i)(format.valid));
    try {
      format.read(file.path());
    } catch (const sida::IoError&) {
      ++refused;
    } catch (const sida::InvalidArgument&) {
      ++refused;
    } catch (const std::exception& error) {
      std::cerr << name << ": seed " << seed + i
                << ": expected IoError or InvalidArgument, got: " << error.what() << "\n";
      return 1;
    }
  }
  std::cout << name << ": " << runs << " damaged files, " << refused
            << " refused, the others read\n";
  return 0;
}

std::uint64_t number(const char* text) {
  std::uint64_t value = 0;
  const std::string_view view(text);
  if (std::from_chars(view.begin(), view.end(), value).ptr != view.end())
    throw std::invalid_argument("expected a number, got " + std::string(view));
  return value;
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 3 || argc > 4) throw std::invalid_argument("usage: fuzz_files FORMAT RUNS [SEED]");
  return run(argv[1], number(argv[2]), argc == 4 ? number(argv[3]) : 0);
} catch (const std::exception& error) {
  std::cerr << error.what() << "\n";
  return 2;
}
