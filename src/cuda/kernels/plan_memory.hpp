// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace sida::cuda {

/// Assignments that one block plans alone, and that one of several takes.
constexpr int most_in_one_block = 2048, plan_chunk = 1024;

}  // namespace sida::cuda
