// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "sida/core/data_type.hpp"
#include "sida/core/error.hpp"
#include "sida/core/tensor_view.hpp"
#include "sida/io/file.hpp"
#include "sida/io/json.hpp"
#include "sida/io/safetensors.hpp"

namespace sida {

/// A tensor to be written; `data` is borrowed.
struct SafetensorsEntry {
  std::string name;
  DataType type = DataType::f32;
  std::vector<std::int64_t> shape;
  std::span<const std::byte> data;  ///< row-major
};

/// Writes a safetensors file, whole or not at all (see write_file). Tensors with wider elements
/// come first, so that each is aligned to its element.
/// @throws InvalidArgument for a name given twice or data that do not fit the shape, IoError when
/// writing fails.
inline void write_safetensors(const std::filesystem::path& path,
                              std::vector<SafetensorsEntry> tensors,
                              const std::map<std::string, std::string>& metadata = {}) {
  std::stable_sort(tensors.begin(), tensors.end(),
                   [](const auto& a, const auto& b) { return size_of(a.type) > size_of(b.type); });
  nlohmann::json header = nlohmann::json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  std::uint64_t position = 0;
  std::vector<std::span<const std::byte>> pieces(2);
  for (const SafetensorsEntry& tensor : tensors) {
    const ConstTensorView view{tensor.data.data(), tensor.type, tensor.shape};
    SIDA_EXPECTS(view.bytes() == tensor.data.size(),
                 "write_safetensors: " + in_quotes(tensor.name) + ": expected " + view.describe() +
                     " in " + std::to_string(view.bytes()) + " bytes, got " +
                     std::to_string(tensor.data.size()));
    SIDA_EXPECTS(
        tensor.name != "__metadata__" && !header.contains(tensor.name),
        "write_safetensors: expected each name once, got " + in_quotes(tensor.name) + " again");
    header[tensor.name] = {{"dtype", safetensors_name(tensor.type)},
                           {"shape", tensor.shape},
                           {"data_offsets", {position, position + tensor.data.size()}}};
    position += tensor.data.size();
    pieces.push_back(tensor.data);
  }
  std::string text;
  try {
    text = header.dump();
  } catch (const nlohmann::json::exception&) {
    throw InvalidArgument("write_safetensors: expected names and metadata in UTF-8");
  }
  text.resize((text.size() + 7) / 8 * 8, ' ');
  const std::uint64_t length = text.size();
  pieces[0] = std::as_bytes(std::span(&length, 1));
  pieces[1] = std::as_bytes(std::span(text));
  write_file(path, pieces);
}

}  // namespace sida
