// SPDX-License-Identifier: Apache-2.0
#include "choose_kernel.hpp"

#include "splits.hpp"

namespace sida::cuda {

Kernel choose_kernel(Dtype dtype, int rows, int top_k, int experts, int hidden, int intermediate) {
  if (!streams_weights(dtype, hidden, intermediate)) return Kernel::general;
  // Where no expert can get many rows, blocks of few weight rows fill more multiprocessors.
  const bool few_rows = rows <= 8 && rows * top_k <= 4 * experts;
  return few_rows ? Kernel::narrow : Kernel::wide;
}

}  // namespace sida::cuda
