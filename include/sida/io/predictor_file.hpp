// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>

#include "sida/core/error.hpp"
#include "sida/hash/predictor_weights.hpp"
#include "sida/io/safetensors.hpp"
#include "sida/io/sida_file.hpp"

namespace sida {

/// The hash predictor in a file of format "sida-predictor", as `sida.train_predictor(...).save()`
/// writes it: f32 tensors, and in the metadata kind, layers, heads (layer indices with commas
/// between), experts, embedding_size, hidden_size, scale_factor and fingerprint. Names and shapes
/// of the tensors are HashPredictor's to check.
/// @throws IoError.
inline PredictorWeights load_predictor(const std::filesystem::path& path) {
  const SafetensorsFile file = SafetensorsFile::open(path);
  expect_format(file, "sida-predictor");
  PredictorWeights weights;
  weights.kind = metadata_text(file, "kind");
  weights.layers = metadata_number<std::int32_t>(file, "layers", 1);
  weights.experts = metadata_number<std::int32_t>(file, "experts", 1);
  weights.embedding_size = metadata_number<std::int32_t>(file, "embedding_size", 1);
  weights.hidden_size = metadata_number<std::int32_t>(file, "hidden_size", 0);
  weights.scale_factor = metadata_number<float>(file, "scale_factor", 0);
  weights.fingerprint = metadata_text(file, "fingerprint");
  if (!std::isfinite(weights.scale_factor))
    throw IoError(path.string() + ": expected a finite scale_factor");
  std::string_view heads = metadata_text(file, "heads");
  for (bool more = true; more;) {
    const std::size_t comma = heads.find(',');
    more = comma != heads.npos;
    const auto layer = metadata_number<std::int32_t>(file, "heads", heads.substr(0, comma));
    if (layer < 0 || layer >= weights.layers)
      throw IoError(path.string() + ": expected heads for layers 0 to " +
                    std::to_string(weights.layers - 1) + ", got " + std::to_string(layer));
    weights.heads.push_back(layer);
    if (more) heads.remove_prefix(comma + 1);
  }
  for (const auto& [name, tensor] : file.tensors())
    weights.tensors.emplace(name, PredictorTensor{tensor.shape, read_values<float>(file, name)});
  return weights;
}

}  // namespace sida
