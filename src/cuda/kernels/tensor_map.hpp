// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda.h>

#include <cstddef>
#include <initializer_list>

#include "expert_kernels.hpp"

namespace sida::cuda {

/// A number of slots above that of any arena: which are there is known to the kernel alone.
constexpr std::size_t any_slot = 1 << 20;

/// How boxes of a tensor of 16-bit elements come to lie in shared memory, in rows of 128 bytes that
/// are swizzled; what lies past the end is zeros. `dimensions` (2 to 5) and `box` are elements from
/// the innermost on, `strides` bytes from the second on.
/// @throws std::runtime_error where the driver does not take it.
CUtensorMap tensor_map(Dtype dtype, const void* base, std::initializer_list<std::size_t> dimensions,
                       std::initializer_list<std::size_t> strides,
                       std::initializer_list<unsigned> box);

}  // namespace sida::cuda
