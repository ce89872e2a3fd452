// SPDX-License-Identifier: Apache-2.0
#include "sida/ffn/kernel_table.hpp"

#include <algorithm>
#include <iterator>
#include <utility>

#include "choose_kernel.hpp"
#include "device_scope.hpp"
#include "launched.hpp"
#include "layer_shape.hpp"

namespace sida {
namespace {

cuda::Kernel kernel_named(const std::string& name) {
  const auto found = std::ranges::find(cuda::kernel_names, name);
  SIDA_EXPECTS(name != cuda::kernel_names[0] && found != std::end(cuda::kernel_names),
               "kernel table: expected a kernel of this version of sida, got '" + name +
                   "'; measure anew with `sida tune`");
  return static_cast<cuda::Kernel>(found - std::begin(cuda::kernel_names));
}

}  // namespace

std::vector<std::string> kernel_names() {
  return {std::begin(cuda::kernel_names) + 1, std::end(cuda::kernel_names)};  // without `tuned`
}

void use_kernels(const CudaBackend& backend, const KernelTable& table) {
  const std::string gpu = backend.device_name();
  SIDA_EXPECTS(table.gpu == gpu, "kernel table: expected one of a " + gpu + ", got one of a " +
                                     table.gpu + "; measure with `sida tune`");
  std::vector<cuda::TunedKernel> tuned;
  for (const KernelChoice& choice : table.choices)
    tuned.push_back({cuda::kernel_type(choice.dtype), choice.gated, choice.top_k, choice.experts,
                     choice.hidden_size, choice.intermediate_size, choice.tokens,
                     kernel_named(choice.kernel)});
  if (!cuda::set_tuned_kernels(backend.device(), std::move(tuned)))
    throw StateError("kernel table: expected to be set once, before the GPU's first layer");
}

std::string kernel_of(const CudaBackend& backend, const MoeConfig& config, std::int32_t tokens) {
  cuda::LayerShape shape = cuda::shape_of(config);
  shape.tokens = tokens;
  const cuda::DeviceScope scope(backend.device());
  std::string name;
  cuda::launched(
      [&] { name = cuda::kernel_names[static_cast<std::size_t>(cuda::choose_kernel(shape))]; });
  return name;
}

}  // namespace sida
