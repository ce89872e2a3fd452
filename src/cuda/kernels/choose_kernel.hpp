// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "expert_kernels.hpp"

namespace sida::cuda {

/// The kernel that the table has for this shape on the current device. narrow and wide give the
/// same bits.
Kernel choose_kernel(const LayerShape& shape);

/// `shape` with the kernel that will run: the one forced where it takes the shape, else the
/// table's.
LayerShape with_kernel(LayerShape shape);

}  // namespace sida::cuda
