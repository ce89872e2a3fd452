// SPDX-License-Identifier: Apache-2.0
#include "choose_kernel.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <memory>
#include <tuple>
#include <utility>

#include "launch.hpp"
#include "splits.hpp"

namespace sida::cuda {
namespace {

#ifdef SIDA_HOPPER
constexpr bool hopper_built = true;
#else
constexpr bool hopper_built = false;
#endif

/// A kernel for calls of so many tokens and choices or fewer, or for so many rows an expert on
/// average or fewer; the first entry that fits counts.
struct Entry {
  int tokens, choices;
  double rows;
  Kernel kernel;
};

constexpr double any = 1e30;
// Measured by benchmarks/cuda_expert_layer.py; `sida tune` measures again on a user's own GPU. Few
// rows need few registers for more blocks; the rare expert with more than eight rows then reads its
// weights again, from L2.
constexpr Entry hopper_table[] = {{8, few_assignments, 0, Kernel::narrow},
                                  {0, 0, 64, Kernel::swapped},
                                  {0, 0, any, Kernel::hopper}};
constexpr Entry other_table[] = {{8, 8 * max_top_k, 0, Kernel::narrow},
                                 {0, 0, 4, Kernel::narrow},
                                 {0, 0, 16, Kernel::wide},
                                 {0, 0, any, Kernel::grouped}};
constexpr Entry full_table[] = {{0, 0, 32, Kernel::dot}, {0, 0, any, Kernel::tiled}};

template <std::size_t rows>
Kernel first_fitting(const Entry (&table)[rows], const LayerShape& shape) {
  const int choices = shape.tokens * shape.top_k;
  const double average = static_cast<double>(choices) / shape.experts;
  for (const Entry& entry : table)
    if ((shape.tokens <= entry.tokens && choices <= entry.choices) || average <= entry.rows)
      return entry.kernel;
  return Kernel::general;
}

// A device's table of measured kernels, or, once a kernel was chosen without one, none.
constexpr int most_devices = 64;
std::array<std::atomic<const std::vector<TunedKernel>*>, most_devices> tuned_tables;
const std::vector<TunedKernel> no_table;

const std::vector<TunedKernel>& tuned_table() {
  const int device = current_device();
  if (device >= most_devices) return no_table;
  auto& place = tuned_tables[static_cast<std::size_t>(device)];
  const std::vector<TunedKernel>* table = place.load(std::memory_order_acquire);
  if (!table && place.compare_exchange_strong(table, &no_table)) return no_table;
  return *table;
}

auto sizes_of(const TunedKernel& entry) {
  return std::tuple(entry.dtype, entry.gated, entry.top_k, entry.experts, entry.hidden,
                    entry.intermediate);
}

unsigned power_of_two(int tokens) {
  return std::bit_ceil(static_cast<unsigned>(std::max(tokens, 1)));
}

}  // namespace

bool takes(const LayerShape& shape, Kernel kernel) {
  switch (kernel) {
    case Kernel::narrow:
    case Kernel::wide:
    case Kernel::grouped:
      return streams_weights(shape.dtype, shape.hidden, shape.intermediate);
    case Kernel::swapped:
    case Kernel::hopper:
      return takes(shape, Kernel::grouped) && hopper_built && compute_capability() == 9;
    case Kernel::dot:
    case Kernel::tiled:
      return shape.dtype == Dtype::f32 && shape.hidden % 4 == 0 && shape.intermediate % 4 == 0;
    default:
      return kernel == Kernel::general;
  }
}

Kernel tuned_kernel(const std::vector<TunedKernel>& table, const LayerShape& shape) {
  const std::tuple sizes(shape.dtype, shape.gated, shape.top_k, shape.experts, shape.hidden,
                         shape.intermediate);
  for (const TunedKernel& entry : table)
    if (power_of_two(entry.tokens) == power_of_two(shape.tokens) && sizes_of(entry) == sizes)
      return entry.kernel;
  return Kernel::tuned;
}

bool set_tuned_kernels(int device, std::vector<TunedKernel> table) {
  if (device < 0 || device >= most_devices) return false;
  auto made = std::make_unique<const std::vector<TunedKernel>>(std::move(table));
  const std::vector<TunedKernel>* none = nullptr;
  if (!tuned_tables[static_cast<std::size_t>(device)].compare_exchange_strong(none, made.get()))
    return false;
  made.release();  // for as long as the process runs
  return true;
}

// cuBLAS is not among them: it wants the rows of each expert on the host, and with all experts
// resident, or with foretold routing, no call waits for them, nor could it be captured into a graph
// that is replayed with other routing. A kernel that depended on who happens to know the rows would
// make results depend on residency. `general` computes what the others do not take; cuBLAS, behind
// torch, is what the tests compare with.
Kernel choose_kernel(const LayerShape& shape) {
  const Kernel measured = tuned_kernel(tuned_table(), shape);
  if (takes(shape, measured)) return measured;
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
