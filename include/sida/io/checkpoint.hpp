// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <system_error>
#include <utility>

#include "sida/core/error.hpp"
#include "sida/io/json.hpp"
#include "sida/io/model_config.hpp"
#include "sida/io/safetensors.hpp"

namespace sida {

/// A tensor of a checkpoint and the file that holds it; both live as long as the Checkpoint.
struct CheckpointTensor {
  const SafetensorsFile* file = nullptr;
  const SafetensorsTensor* tensor = nullptr;
};

/// The tensors of a model in one safetensors file or in shards, found by name, with what its
/// config.json says. Headers only: weights stay in the files. Immutable and thread-safe.
class Checkpoint {
 public:
  /// Opens a .safetensors file, or a folder with model.safetensors or with
  /// model.safetensors.index.json and its shards, and the config.json beside them where there is
  /// one. Every header is checked.
  /// @throws IoError naming the file that is missing or wrong.
  static std::shared_ptr<const Checkpoint> open(const std::filesystem::path& path) {
    auto checkpoint = std::shared_ptr<Checkpoint>(new Checkpoint(path));
    std::error_code ignored;  // what cannot be seen is not there; opening it says why
    const bool is_folder = std::filesystem::is_directory(path, ignored);
    const std::filesystem::path folder = is_folder ? path : path.parent_path();
    if (!is_folder) {
      checkpoint->add_file(path);
    } else if (exists(folder / "model.safetensors")) {
      checkpoint->add_file(folder / "model.safetensors");
    } else if (exists(folder / "model.safetensors.index.json")) {
      checkpoint->add_shards(folder / "model.safetensors.index.json");
    } else {
      throw IoError(path.string() +
                    ": expected model.safetensors or model.safetensors.index.json in the folder, "
                    "found neither; save the model with save_pretrained first");
    }
    if (exists(folder / "config.json"))
      checkpoint->model_config_ = read_model_config(folder / "config.json");
    return checkpoint;
  }

  const std::filesystem::path& path() const noexcept { return path_; }
  const std::map<std::string, CheckpointTensor>& tensors() const noexcept { return tensors_; }
  const std::optional<ModelConfig>& model_config() const noexcept { return model_config_; }

 private:
  explicit Checkpoint(std::filesystem::path path) : path_(std::move(path)) {}

  static bool exists(const std::filesystem::path& path) {
    std::error_code ignored;
    return std::filesystem::exists(path, ignored);
  }

  const SafetensorsFile& open_file(const std::filesystem::path& path) {
    return files_.emplace(path.string(), SafetensorsFile::open(path)).first->second;
  }

  void add_file(const std::filesystem::path& path) {
    const SafetensorsFile& file = open_file(path);
    for (const auto& [name, tensor] : file.tensors())
      tensors_.emplace(name, CheckpointTensor{&file, &tensor});
  }

  void add_shards(const std::filesystem::path& index) {
    const nlohmann::json json = read_json(index, std::uint64_t{256} << 20);
    if (!json.is_object() || !json.contains("weight_map") || !json["weight_map"].is_object())
      throw IoError(index.string() + ": expected an object with an object weight_map");
    for (const auto& [name, shard] : json["weight_map"].items()) {
      if (!shard.is_string())
        throw IoError(index.string() + ": expected weight_map to name a file for " +
                      in_quotes(name));
      const SafetensorsFile& file = open_shard(index, shard.get_ref<const std::string&>());
      tensors_.emplace(name, CheckpointTensor{&file, &file.tensor(name)});
    }
  }

  const SafetensorsFile& open_shard(const std::filesystem::path& index, const std::string& shard) {
    const std::filesystem::path relative(shard);
    bool inside = !shard.empty() && relative.is_relative();
    for (const auto& step : relative) inside = inside && step != "..";
    if (!inside)
      throw IoError(index.string() + ": expected shards in the index's own folder, got " +
                    in_quotes(shard));
    const std::filesystem::path path = index.parent_path() / relative;
    if (const auto open = files_.find(path.string()); open != files_.end()) return open->second;
    if (!exists(path))
      throw IoError(path.string() + ": the shard is missing, but " + index.filename().string() +
                    " names it; fetch the whole checkpoint");
    return open_file(path);
  }

  std::filesystem::path path_;
  std::map<std::string, SafetensorsFile> files_;  ///< by path
  std::map<std::string, CheckpointTensor> tensors_;
  std::optional<ModelConfig> model_config_;
};

}  // namespace sida
