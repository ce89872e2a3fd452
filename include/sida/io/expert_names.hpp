// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <tuple>
#include <utility>
#include <vector>

namespace sida {

/// How a checkpoint names and divides the experts of a layer.
enum class ExpertLayout : std::uint8_t {
  switch_transformers,  ///< experts.expert_{e}.wi / wo
  per_expert,           ///< experts.{e}.gate_proj / up_proj / down_proj
  mixtral,              ///< experts.{e}.w1 / w3 / w2: gate, up, down
  stacked,              ///< experts.gate_up_proj or up_proj, and down_proj, all experts in one
};

constexpr std::string_view name_of(ExpertLayout layout) noexcept {
  switch (layout) {
    case ExpertLayout::switch_transformers:
      return "switch_transformers";
    case ExpertLayout::per_expert:
      return "per_expert";
    case ExpertLayout::mixtral:
      return "mixtral";
    case ExpertLayout::stacked:
      return "stacked";
  }
  return "?";
}

/// A matrix (or bias) of an expert. `gate_up` is gate and up in one tensor.
enum class ExpertMatrix : std::uint8_t { gate, up, gate_up, down };

/// What a tensor holds of a matrix: all of it, its bias, or, where it is packed, its codes in
/// `blocks` (MXFP4) or `weight` (fp8) and the blocks' `scales`.
enum class ExpertRole : std::uint8_t { weight, bias, blocks, scales };

/// What the name of a tensor says when it lies under a module `experts`.
struct ExpertTensorName {
  std::string layer;  ///< the part before ".experts"
  /// Empty if the rest of the name is of no known layout; then so are the other fields.
  std::optional<ExpertLayout> layout;
  std::int64_t expert = -1;  ///< -1: all of them
  ExpertMatrix matrix = ExpertMatrix::up;
  ExpertRole role = ExpertRole::weight;
};

/// @cond
namespace detail {

inline std::vector<std::string_view> split(std::string_view text, char separator) {
  std::vector<std::string_view> parts;
  for (std::size_t begin = 0;;) {
    const std::size_t end = text.find(separator, begin);
    parts.push_back(text.substr(begin, end - begin));
    if (end == text.npos) return parts;
    begin = end + 1;
  }
}

/// The number that `text` spells without leading zeros, if it is one.
inline std::optional<std::int64_t> parse_index(std::string_view text) {
  std::int32_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || text.front() == '-' ||
      (text.front() == '0' && text.size() > 1))
    return std::nullopt;
  return value;
}

struct MatrixName {
  ExpertLayout layout;
  std::string_view name;
  ExpertMatrix matrix;
};
inline constexpr MatrixName matrix_names[] = {
    {ExpertLayout::switch_transformers, "wi", ExpertMatrix::up},
    {ExpertLayout::switch_transformers, "wo", ExpertMatrix::down},
    {ExpertLayout::per_expert, "gate_proj", ExpertMatrix::gate},
    {ExpertLayout::per_expert, "up_proj", ExpertMatrix::up},
    {ExpertLayout::per_expert, "down_proj", ExpertMatrix::down},
    {ExpertLayout::mixtral, "w1", ExpertMatrix::gate},
    {ExpertLayout::mixtral, "w3", ExpertMatrix::up},
    {ExpertLayout::mixtral, "w2", ExpertMatrix::down},
    {ExpertLayout::stacked, "gate_up_proj", ExpertMatrix::gate_up},
    {ExpertLayout::stacked, "up_proj", ExpertMatrix::up},
    {ExpertLayout::stacked, "down_proj", ExpertMatrix::down},
};

struct RoleName {
  std::string_view name;
  ExpertRole role;
};
inline constexpr RoleName separate_roles[] = {{"weight", ExpertRole::weight},
                                              {"bias", ExpertRole::bias},
                                              {"weight_scale_inv", ExpertRole::scales}};
inline constexpr RoleName stacked_suffixes[] = {
    {"_bias", ExpertRole::bias}, {"_blocks", ExpertRole::blocks}, {"_scales", ExpertRole::scales}};

inline const MatrixName* find_matrix(std::string_view name, bool stacked) {
  for (const MatrixName& known : matrix_names)
    if (known.name == name && (known.layout == ExpertLayout::stacked) == stacked) return &known;
  return nullptr;
}

}  // namespace detail
/// @endcond

/// @cond
namespace detail {

/// GraniteMoE's names of stacked experts, which lie under no module "experts".
inline std::optional<ExpertTensorName> parse_granite_name(std::string_view name) {
  constexpr std::string_view module = ".block_sparse_moe";
  for (const auto& [end, matrix] : {std::pair(".input_linear.weight", ExpertMatrix::gate_up),
                                    std::pair(".output_linear.weight", ExpertMatrix::down)}) {
    if (!name.ends_with(end)) continue;
    name.remove_suffix(std::string_view(end).size());
    if (!name.ends_with(module)) return std::nullopt;
    return ExpertTensorName{std::string(name), ExpertLayout::stacked, -1, matrix,
                            ExpertRole::weight};
  }
  return std::nullopt;
}

}  // namespace detail
/// @endcond

/// Reads a tensor's name; empty unless it lies under a module called "experts" (or is
/// GraniteMoE's).
inline std::optional<ExpertTensorName> parse_expert_tensor_name(std::string_view name) {
  if (auto granite = detail::parse_granite_name(name)) return granite;
  std::vector<std::string_view> parts = detail::split(name, '.');
  const auto module = std::find(parts.rbegin(), parts.rend(), "experts").base();  // one behind it
  if (module == parts.begin() || module == parts.end()) return std::nullopt;
  ExpertTensorName result;
  for (auto part = parts.begin(); part != module - 1; ++part)
    result.layer += (part == parts.begin() ? "" : ".") + std::string(*part);
  parts.erase(parts.begin(), module);
  if (parts.size() == 1) {
    for (const auto& [suffix, role] : detail::stacked_suffixes) {
      if (!parts[0].ends_with(suffix)) continue;
      parts[0].remove_suffix(suffix.size());
      result.role = role;
      break;
    }
    if (const auto* matrix = detail::find_matrix(parts[0], true)) {
      result.layout = matrix->layout;
      result.matrix = matrix->matrix;
    }
    return result;
  }
  if (parts.size() != 3) return result;
  const auto* role =
      std::find_if(std::begin(detail::separate_roles), std::end(detail::separate_roles),
                   [&](const detail::RoleName& known) { return known.name == parts[2]; });
  if (role == std::end(detail::separate_roles)) return result;
  constexpr std::string_view prefix = "expert_";
  const bool prefixed = parts[0].starts_with(prefix);
  if (prefixed) parts[0].remove_prefix(prefix.size());
  const auto expert = detail::parse_index(parts[0]);
  const auto* matrix = detail::find_matrix(parts[1], false);
  if (!expert || !matrix || prefixed != (matrix->layout == ExpertLayout::switch_transformers))
    return result;
  result.layout = matrix->layout;
  result.expert = *expert;
  result.matrix = matrix->matrix;
  result.role = role->role;
  return result;
}

/// Whether the layer called `a` stands before `b` in the model: numbers by their value, encoder
/// before decoder. A strict weak order for any names.
inline bool layer_before(std::string_view a, std::string_view b) {
  const auto key = [](std::string_view part) {
    const auto number = detail::parse_index(part);
    const int kind = number ? 0 : part == "encoder" ? 1 : part == "decoder" ? 2 : 3;
    return std::tuple(kind, number.value_or(0), part);
  };
  const auto left = detail::split(a, '.'), right = detail::split(b, '.');
  return std::lexicographical_compare(
      left.begin(), left.end(), right.begin(), right.end(),
      [&](std::string_view x, std::string_view y) { return key(x) < key(y); });
}

}  // namespace sida
