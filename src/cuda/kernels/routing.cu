// SPDX-License-Identifier: Apache-2.0
#include "element.cuh"
#include "expert_kernels.hpp"
#include "launch.cuh"

namespace sida::cuda {
namespace {

constexpr int routing_threads = 256;

__device__ std::int32_t narrowed(std::int64_t id) {
  constexpr std::int64_t most = 0x7fffffff;
  return static_cast<std::int32_t>(id < -most ? -most : id > most ? most : id);
}

/// A thread takes one assignment.
template <class Id, class Weight>
__global__ void __launch_bounds__(routing_threads)
    routing_kernel(LayerShape shape, const Id* ids, const Weight* weights, const std::uint8_t* keep,
                   TakenRouting taken) {
  const int a = static_cast<int>(blockIdx.x) * routing_threads + static_cast<int>(threadIdx.x);
  if (a >= shape.tokens * shape.top_k) return;
  const bool is_kept = keep == nullptr || keep[a / shape.top_k] != 0;
  const float weight = is_kept ? to_float(weights[a]) : 0.0f;
  const std::int32_t id = narrowed(ids[a]);
  taken.ids[a] = id;
  taken.weights[a] = weight;
  const bool is_left_out = weight == 0.0f || id == shape.experts;
  taken.host_ids[a] = is_left_out ? left_out : id;
  taken.host_weights[a] = is_left_out ? 0.0f : weight;
}

template <class Id>
void launch_routing(const LayerShape& shape, const GivenRouting& given, const TakenRouting& taken,
                    Stream stream) {
  const int assignments = shape.tokens * shape.top_k;
  const auto blocks = static_cast<unsigned>((assignments + routing_threads - 1) / routing_threads);
  with_element(given.weights_type, [&](auto element) {
    using Weight = decltype(element);
    routing_kernel<<<blocks, routing_threads, 0, stream>>>(
        shape, static_cast<const Id*>(given.ids), static_cast<const Weight*>(given.weights),
        given.keep, taken);
  });
  check(cudaGetLastError(), "launch the copy of a call's routing");
}

}  // namespace

void take_routing(const LayerShape& shape, const GivenRouting& given, const TakenRouting& taken,
                  Stream stream) {
  if (shape.tokens == 0) return;
  if (given.wide_ids)
    launch_routing<std::int64_t>(shape, given, taken, stream);
  else
    launch_routing<std::int32_t>(shape, given, taken, stream);
}

}  // namespace sida::cuda
