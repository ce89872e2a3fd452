// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace sida::detail {

/// Rows that are packed together at most. A product's rows are packed in groups of this many, the
/// last of which may have fewer.
inline constexpr std::int64_t packed_rows = 16;

/// Packs `columns` (a multiple of 32) of up to packed_rows rows of bf16 so that the kernel's second
/// operand is in one piece: to[c / 2][r][c % 2] = rows[r][c]. It takes as much memory as the rows.
template <class Input>
using PackFunction = void (*)(const Input* const* rows, std::int64_t count, std::int64_t columns,
                              Input* to);

}  // namespace sida::detail
