// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "sida/core/data_type.hpp"
#include "sida/core/error.hpp"
#include "sida/core/half.hpp"
#include "sida/core/tensor_view.hpp"

namespace sida {

/// The assignments (token t, choice j) of one layer call, grouped by expert. Row r of the sorted
/// order belongs to assignment order[r] = t * top_k + j.
struct TokenGroups {
  std::int32_t top_k = 1;
  std::int64_t tokens = 0;
  std::vector<std::int32_t> experts;  ///< active experts (those with a row), ascending
  std::vector<std::int64_t> offsets;  ///< [experts.size() + 1] into the sorted rows
  std::vector<std::int64_t> order;    ///< sorted row -> assignment, ascending within an expert
  std::vector<std::int64_t> row_of;   ///< assignment -> sorted row, or -1 if left out

  std::int64_t rows() const noexcept { return static_cast<std::int64_t>(order.size()); }
};

namespace detail {

template <class T>
T load(const std::byte* data, std::int64_t index) noexcept {
  T value;
  std::memcpy(&value, data + static_cast<std::size_t>(index) * sizeof(T), sizeof(T));
  return value;
}

/// Element `index` of a tensor of floating-point type.
inline double load_real(const ConstTensorView& view, std::int64_t index) noexcept {
  switch (view.type) {
    case DataType::f64:
      return load<double>(view.data, index);
    case DataType::f16:
      return to_f32(load<Half>(view.data, index));
    case DataType::bf16:
      return to_f32(load<BFloat16>(view.data, index));
    default:
      return load<float>(view.data, index);
  }
}

inline std::int64_t load_index(const ConstTensorView& view, std::int64_t index) noexcept {
  return view.type == DataType::i64 ? load<std::int64_t>(view.data, index)
                                    : load<std::int32_t>(view.data, index);
}

inline void check_routing(const ConstTensorView& ids, const ConstTensorView& weights,
                          std::span<const std::uint8_t> keep) {
  SIDA_EXPECTS(ids.shape.size() == 2 && ids.shape[0] >= 0 && ids.shape[1] > 0 &&
                   (ids.type == DataType::i32 || ids.type == DataType::i64),
               "expert ids: expected [tokens, top_k] i32 or i64, got " + ids.describe());
  SIDA_EXPECTS(weights.shape == ids.shape && weights.type <= DataType::f64,
               "expert weights: expected the ids' shape [" + std::to_string(ids.shape[0]) + ", " +
                   std::to_string(ids.shape[1]) + "] in a floating-point dtype, got " +
                   weights.describe());
  SIDA_EXPECTS(keep.empty() || static_cast<std::int64_t>(keep.size()) == ids.shape[0],
               "keep: expected one flag for each of the " + std::to_string(ids.shape[0]) +
                   " tokens, got " + std::to_string(keep.size()));
}

}  // namespace detail

/// Groups a layer call's assignments by expert, leaving out those whose weight is 0 and, where
/// `keep` is given, the tokens with keep[t] == 0.
///
/// ids: [T, k] i32 or i64; weights: [T, k] of a floating-point type; keep: [T] or empty. The id of
/// an assignment that is left out is not looked at. One token may name an expert twice.
/// @throws OutOfRange naming an id outside [0, experts), InvalidArgument for shapes and dtypes.
inline TokenGroups group_tokens(const ConstTensorView& ids, const ConstTensorView& weights,
                                std::int32_t experts, std::span<const std::uint8_t> keep = {}) {
  detail::check_routing(ids, weights, keep);
  TokenGroups groups;
  groups.tokens = ids.shape[0];
  groups.top_k = static_cast<std::int32_t>(ids.shape[1]);
  const std::int64_t assignments = ids.elements();
  groups.row_of.assign(static_cast<std::size_t>(assignments), -1);

  // Pass 1 puts each assignment's expert into row_of and counts; pass 2 turns it into the row.
  std::vector<std::int64_t> next(static_cast<std::size_t>(experts) + 1, 0);
  for (std::int64_t a = 0; a < assignments; ++a) {
    const std::int64_t token = a / groups.top_k;
    if (!keep.empty() && keep[static_cast<std::size_t>(token)] == 0) continue;
    if (detail::load_real(weights, a) == 0) continue;
    const std::int64_t id = detail::load_index(ids, a);
    if (id < 0 || id >= experts)
      throw OutOfRange("expert ids: expected 0 to " + std::to_string(experts - 1) + ", got " +
                       std::to_string(id) + " for token " + std::to_string(token));
    groups.row_of[static_cast<std::size_t>(a)] = id;
    ++next[static_cast<std::size_t>(id) + 1];
  }
  for (std::size_t e = 0; e < static_cast<std::size_t>(experts); ++e) {
    if (next[e + 1] > 0) {
      groups.experts.push_back(static_cast<std::int32_t>(e));
      groups.offsets.push_back(next[e]);
    }
    next[e + 1] += next[e];
  }
  groups.offsets.push_back(next.back());
  groups.order.resize(static_cast<std::size_t>(next.back()));
  for (std::int64_t a = 0; a < assignments; ++a) {
    std::int64_t& row = groups.row_of[static_cast<std::size_t>(a)];
    if (row < 0) continue;
    row = next[static_cast<std::size_t>(row)]++;
    groups.order[static_cast<std::size_t>(row)] = a;
  }
  return groups;
}

}  // namespace sida
