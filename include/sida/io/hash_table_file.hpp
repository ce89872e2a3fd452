// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <bit>
#include <cstdint>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "sida/core/error.hpp"
#include "sida/hash/hash_table.hpp"
#include "sida/io/safetensors.hpp"
#include "sida/io/safetensors_writer.hpp"
#include "sida/io/sida_file.hpp"

namespace sida {

/// Writes `table` to a file of format "sida-hash-table", whole or not at all: keys I64 [batches]
/// (the bits of the u64), offsets I64 [batches + 1], ids I32, probs F32 and scale F32
/// [layers, tokens, candidates]. `notes` are further metadata, for people and other tools.
/// @throws InvalidArgument if the table is not valid (HashTable::validate), IoError when writing
/// fails.
inline void save_hash_table(const std::filesystem::path& path, const HashTable& table,
                            const std::map<std::string, std::string>& notes = {}) {
  table.validate();
  const auto bytes = [](const auto& values) { return std::as_bytes(std::span(values)); };
  const std::vector<std::int64_t> shape{table.layers, table.tokens(), table.candidates};
  std::map<std::string, std::string> metadata = notes;
  metadata["format"] = "sida-hash-table";
  metadata["version"] = "1";
  metadata["layers"] = std::to_string(table.layers);
  metadata["candidates"] = std::to_string(table.candidates);
  write_safetensors(path,
                    {{"keys", DataType::i64, {table.batches()}, bytes(table.keys)},
                     {"offsets", DataType::i64, {table.batches() + 1}, bytes(table.offsets)},
                     {"ids", DataType::i32, shape, bytes(table.ids)},
                     {"probs", DataType::f32, shape, bytes(table.probs)},
                     {"scale", DataType::f32, shape, bytes(table.scale)}},
                    metadata);
}

/// The hash table in a file that save_hash_table wrote. @throws IoError.
inline HashTable load_hash_table(const std::filesystem::path& path) {
  const SafetensorsFile file = SafetensorsFile::open(path);
  expect_format(file, "sida-hash-table");
  HashTable table;
  table.layers = metadata_number<std::int32_t>(file, "layers", 0);
  table.candidates = metadata_number<std::int32_t>(file, "candidates", 0);
  for (const std::int64_t key : read_values<std::int64_t>(file, "keys"))
    table.keys.push_back(std::bit_cast<std::uint64_t>(key));
  table.offsets = read_values<std::int64_t>(file, "offsets");
  if (table.offsets.empty()) throw IoError(path.string() + ": expected offsets, got none");
  table.ids = read_values<std::int32_t>(file, "ids");
  table.probs = read_values<float>(file, "probs");
  table.scale = read_values<float>(file, "scale");
  const std::vector<std::int64_t> shape{table.layers, table.tokens(), table.candidates};
  for (const char* name : {"ids", "probs", "scale"}) {
    if (file.tensor(name).shape != shape)
      throw IoError(path.string() + ": expected '" + name + "' to be " +
                    ConstTensorView{nullptr, DataType::f32, shape}.describe() +
                    ", got another shape");
  }
  try {
    table.validate();
  } catch (const InvalidArgument& error) {
    throw IoError(path.string() + ": " + error.what());
  }
  return table;
}

}  // namespace sida
