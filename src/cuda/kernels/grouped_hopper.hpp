// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "product.hpp"

namespace sida::cuda {

/// Enqueues a grouped product of 16-bit weights on Hopper's tensor copies and wgmma: shapes that
/// streams_weights() takes, results of the dtype.
void launch_hopper(const Product& product, Phase phase, Stream stream);

}  // namespace sida::cuda
