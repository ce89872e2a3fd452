// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "choose_kernel.hpp"
#include "expert_kernels.hpp"
#include "full.cuh"
#include "general.cuh"
#include "grouped.hpp"
#include "launch.cuh"
#include "streaming.cuh"

namespace sida::cuda {
namespace {

unsigned blocks(int count, int each) { return static_cast<unsigned>(parts_of(count, each)); }

template <class Element, Phase phase>
void launch_product(const Product& product, const FewSlots& few, cudaStream_t stream) {
  constexpr const char* what = "launch a product of expert weights";
  const LayerShape& shape = product.shape;
  const Kernel kernel = shape.kernel;
  if (kernel == Kernel::swapped) return launch_swapped(product, phase, stream);
  if (kernel == Kernel::hopper) return launch_hopper(product, phase, stream);
  if (kernel == Kernel::grouped) return launch_grouped(product, phase, stream);
  const int outputs = phase == Phase::down ? shape.hidden : shape.intermediate;
  const auto experts = static_cast<unsigned>(std::min(shape.experts, shape.tokens * shape.top_k));
  if constexpr (!std::is_same_v<Element, float>) {
    constexpr int stripe = stripe_outputs<phase>;
    const auto splits = static_cast<unsigned>(phase == Phase::down ? down_splits(shape, 1) : 1);
    if (kernel == Kernel::narrow)
      return launch(what, streaming_kernel<Element, phase, 1, 1>,
                    dim3(blocks(outputs, stripe), experts, splits), streaming_threads, stream,
                    product, few);
    if (kernel == Kernel::wide)
      return launch(what, streaming_kernel<Element, phase, 2, 4>,
                    dim3(blocks(outputs, 2 * stripe), experts, splits), streaming_threads, stream,
                    product, few);
  }
  if constexpr (std::is_same_v<Element, float>) {
    if (kernel == Kernel::dot)
      return launch(what, dot_kernel<phase>, dim3(blocks(outputs, dot_outputs), experts),
                    full_threads, stream, product);
    if (kernel == Kernel::tiled) {
      constexpr int each = phase == Phase::gated_up ? full_outputs / 2 : full_outputs;
      const unsigned row_blocks = std::min(blocks(shape.tokens, full_rows), 16u);
      check(cudaFuncSetAttribute(tiled_kernel<phase>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(totals_bytes<phase>)),
            "reserve shared memory");
      return launch_shared(what, tiled_kernel<phase>,
                           dim3(blocks(outputs, each), experts, row_blocks), full_threads,
                           totals_bytes<phase>, stream, product);
    }
  }
  const unsigned row_blocks = std::min(blocks(shape.tokens, general_rows), 16u);
  launch(what, general_kernel<Element, phase>,
         dim3(blocks(outputs, general_outputs), experts, row_blocks), general_threads, stream,
         product);
}

}  // namespace

std::size_t workspace_bytes(const LayerShape& given) {
  const LayerShape shape = with_kernel(given);
  const std::size_t element =
      short_results(shape.kernel) ? 2 : sizeof(float) * down_splits(shape, 1);
  return results_offset(shape) + element * static_cast<std::size_t>(shape.tokens) *
                                     static_cast<std::size_t>(shape.top_k) *
                                     static_cast<std::size_t>(shape.hidden);
}

void compute_experts(const LayerShape& given, const Plan& plan, const void* hidden,
                     const ExpertSlabs& slabs, std::byte* workspace, Stream stream,
                     const FewSlots& few) {
  if (given.tokens == 0) return;
  const LayerShape shape = with_kernel(given);
  with_element(shape.dtype, [&](auto element) {
    using Element = decltype(element);
    const Product up{shape, plan, slabs, hidden, workspace};
    const Product down{shape, plan, slabs, workspace, workspace + results_offset(shape)};
    if (shape.gated)
      launch_product<Element, Phase::gated_up>(up, few, stream);
    else
      launch_product<Element, Phase::up>(up, few, stream);
    launch_product<Element, Phase::down>(down, few, stream);
  });
}

}  // namespace sida::cuda
