// SPDX-License-Identifier: Apache-2.0
#include "choose_kernel.hpp"

#include "splits.hpp"

namespace sida::cuda {

Kernel choose_kernel(Dtype dtype, int rows, int top_k, int experts, int hidden, int intermediate) {
  if (!streams_weights(dtype, hidden, intermediate)) return Kernel::general;
  // Up to four rows an expert on average, blocks of few weight rows and tokens leave registers for
  // more blocks; the rare expert with more than eight rows reads its weights again, from L2.
  const bool few_rows = rows <= 8 || rows * top_k <= 4 * experts;
  return few_rows ? Kernel::narrow : Kernel::wide;
}

}  // namespace sida::cuda
