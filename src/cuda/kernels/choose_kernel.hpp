// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <iterator>
#include <string_view>
#include <vector>

#include "expert_kernels.hpp"

namespace sida::cuda {

/// Each kernel's name, in the order of Kernel.
inline constexpr std::string_view kernel_names[] = {
    "tuned", "narrow", "wide", "grouped", "swapped", "hopper", "dot", "tiled", "general"};
static_assert(std::size(kernel_names) == static_cast<std::size_t>(Kernel::general) + 1);

/// Whether a kernel computes this shape on the current device; `tuned` is none.
bool takes(const LayerShape& shape, Kernel kernel);

/// A kernel that was measured to be best for calls of one shape: its dtype, gate and sizes are
/// those of the call, and tokens come to the same power of two when both are rounded up to one.
struct TunedKernel {
  Dtype dtype = Dtype::f32;
  bool gated = false;
  int top_k = 1, experts = 1, hidden = 1, intermediate = 1, tokens = 1;
  Kernel kernel = Kernel::tuned;
};

/// What a table of measured kernels says of a shape; Kernel::tuned where it says nothing. Of two
/// entries for one shape the first counts.
Kernel tuned_kernel(const std::vector<TunedKernel>& table, const LayerShape& shape);

/// Has choose_kernel() ask this table first on a device, until the process ends. It is set once,
/// before the device's first layer, so that a shape's kernel never changes: returns false, and does
/// nothing, once there is a table or a kernel was chosen.
bool set_tuned_kernels(int device, std::vector<TunedKernel> table);

/// The kernel for this shape on the current device: the one function that says so. It depends on
/// the shape (through tokens on the average rows of an expert) and on the tables alone. narrow and
/// wide give the same bits.
Kernel choose_kernel(const LayerShape& shape);

/// `shape` with the kernel that will run: the one forced where it takes the shape, else the
/// chosen one.
LayerShape with_kernel(LayerShape shape);

}  // namespace sida::cuda
