// SPDX-License-Identifier: Apache-2.0
// One expert layer behind plain C functions: cuda_expert_layer.py calls it beside what it is
// compared with, on the same tensors. A shape is eleven ints in the order of cuda::LayerShape.
#include <cstdint>
#include <cstdio>
#include <exception>

#include "expert_kernels.hpp"

namespace {

using namespace sida;

cuda::LayerShape shape_of(const int* values) {
  cuda::LayerShape shape;
  shape.dtype = static_cast<cuda::Dtype>(values[0]);
  shape.tokens = values[1];
  shape.top_k = values[2];
  shape.experts = values[3];
  shape.hidden = values[4];
  shape.intermediate = values[5];
  shape.activation = static_cast<cuda::Act>(values[6]);
  shape.gated = values[7] != 0;
  shape.up_bias = values[8] != 0;
  shape.down_bias = values[9] != 0;
  shape.kernel = static_cast<cuda::Kernel>(values[10]);
  return shape;
}

}  // namespace

extern "C" {

struct ExpertLayerPointers {
  const std::int32_t* ids;
  const float* weights;
  const void* hidden;
  const std::byte* arena;
  const std::int32_t* slot_of;
  std::byte* plan;
  std::byte* workspace;
  std::byte* counters;
  void* out;
  std::uint64_t stride, down_offset, up_bias_offset, down_bias_offset;
};

std::uint64_t expert_layer_plan_bytes(const int* shape) {
  return cuda::plan_bytes(shape_of(shape));
}

std::uint64_t expert_layer_workspace_bytes(const int* shape) {
  return cuda::workspace_bytes(shape_of(shape));
}

std::uint64_t expert_layer_counter_bytes(const int* shape) {
  return cuda::few_bytes(shape_of(shape));
}

/// Enqueues a layer; with `plan_only` its plan. 0, or 1 after an error, which is printed.
int expert_layer(const int* values, const ExpertLayerPointers* at, int plan_only,
                 cuda::Stream stream) {
  try {
    const cuda::LayerShape shape = shape_of(values);
    const cuda::Plan plan = cuda::plan_at(shape, at->plan);
    const cuda::GivenRouting given{at->ids, false, at->weights};
    const cuda::ExpertSlabs slabs{at->arena,       at->stride,         at->slot_of,         0,
                                  at->down_offset, at->up_bias_offset, at->down_bias_offset};
    if (cuda::is_few(shape) && !plan_only) {
      cuda::compute_few(shape, given, {}, at->hidden, slabs, at->workspace, at->counters, at->out,
                        stream);
      return 0;
    }
    cuda::make_plan(shape, given, {}, plan, stream);
    if (plan_only) return 0;
    cuda::compute_experts(shape, plan, at->hidden, slabs, at->workspace, stream);
    cuda::combine(shape, plan, at->weights, at->workspace, at->out, stream);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "expert_layer: %s\n", error.what());
    return 1;
  }
}

}  // extern "C"
