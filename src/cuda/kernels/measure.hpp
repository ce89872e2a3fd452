// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "expert_kernels.hpp"

/// What measuring the kernels needs beside them.
namespace sida::cuda {

/// Fills `to` with `count` numbers of the dtype, even over [-scale, scale], by `seed`.
/// @throws std::runtime_error if a launch fails.
void fill_random(Dtype dtype, std::byte* to, std::size_t count, float scale, std::uint32_t seed,
                 Stream stream);

/// Reads `bytes` bytes, a multiple of 16, so that L2 holds them and nothing else, and no lines that
/// are yet to be written. `sink` [1] takes what keeps the reads from being left out.
/// @throws as fill_random().
void read_through(const std::byte* from, std::size_t bytes, unsigned* sink, Stream stream);

}  // namespace sida::cuda
