// SPDX-License-Identifier: Apache-2.0
#include "choose_kernel.hpp"

#include "launch.hpp"
#include "splits.hpp"

namespace sida::cuda {
namespace {

#ifdef SIDA_HOPPER
constexpr bool hopper_built = true;
#else
constexpr bool hopper_built = false;
#endif

/// A kernel for calls of so many tokens or fewer, and for so many rows an expert on average or
/// fewer; the first entry that fits counts.
struct Entry {
  int tokens;
  double rows;
  Kernel kernel;
};

constexpr double any = 1e30;
// Measured by benchmarks/cuda_expert_layer.py. Few rows need few registers for more blocks; the
// rare expert with more than eight rows then reads its weights again, from L2.
constexpr Entry hopper_table[] = {
    {8, 0, Kernel::narrow}, {0, 1, Kernel::narrow}, {0, any, Kernel::hopper}};
constexpr Entry other_table[] = {{8, 0, Kernel::narrow},
                                 {0, 4, Kernel::narrow},
                                 {0, 16, Kernel::wide},
                                 {0, any, Kernel::grouped}};
constexpr Entry full_table[] = {{0, 32, Kernel::dot}, {0, any, Kernel::tiled}};

bool takes(const LayerShape& shape, Kernel kernel) {
  switch (kernel) {
    case Kernel::narrow:
    case Kernel::wide:
    case Kernel::grouped:
      return streams_weights(shape.dtype, shape.hidden, shape.intermediate);
    case Kernel::hopper:
      return takes(shape, Kernel::grouped) && hopper_built && compute_capability() == 9;
    case Kernel::dot:
    case Kernel::tiled:
      return shape.dtype == Dtype::f32 && shape.hidden % 4 == 0 && shape.intermediate % 4 == 0;
    default:
      return kernel == Kernel::general;
  }
}

template <std::size_t rows>
Kernel first_fitting(const Entry (&table)[rows], const LayerShape& shape) {
  const double average = static_cast<double>(shape.tokens) * shape.top_k / shape.experts;
  for (const Entry& entry : table)
    if (shape.tokens <= entry.tokens || average <= entry.rows) return entry.kernel;
  return Kernel::general;
}

}  // namespace

Kernel choose_kernel(const LayerShape& shape) {
  if (takes(shape, Kernel::tiled)) return first_fitting(full_table, shape);
  if (takes(shape, Kernel::hopper)) return first_fitting(hopper_table, shape);
  if (takes(shape, Kernel::grouped)) return first_fitting(other_table, shape);
  return Kernel::general;
}

LayerShape with_kernel(LayerShape shape) {
  if (!takes(shape, shape.kernel)) shape.kernel = choose_kernel(shape);
  return shape;
}

}  // namespace sida::cuda
