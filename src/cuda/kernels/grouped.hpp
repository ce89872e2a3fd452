// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "product.hpp"

/// Grouped products of 16-bit weights for many rows an expert, of shapes that streams_weights()
/// takes; results are of the dtype.
namespace sida::cuda {

/// Enqueues Kernel::grouped.
void launch_grouped(const Product& product, Phase phase, Stream stream);

/// Enqueues Kernel::swapped.
void launch_swapped(const Product& product, Phase phase, Stream stream);

/// Enqueues Kernel::hopper.
void launch_hopper(const Product& product, Phase phase, Stream stream);

}  // namespace sida::cuda
