// SPDX-License-Identifier: Apache-2.0
#include "tensor_map.hpp"

#include <cudaTypedefs.h>

#include <algorithm>

#include "launch.hpp"

namespace sida::cuda {
namespace {

constexpr std::size_t most_dimensions = 5;

PFN_cuTensorMapEncodeTiled_v12000 encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                         cudaEnableDefault, &found),
        "find the driver's tensor copies");
  check(found == cudaDriverEntryPointSuccess ? cudaSuccess : cudaErrorNotSupported,
        "find the driver's tensor copies");
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
}

}  // namespace

CUtensorMap tensor_map(Dtype dtype, const void* base, std::initializer_list<std::size_t> dimensions,
                       std::initializer_list<std::size_t> strides,
                       std::initializer_list<unsigned> box) {
  static const auto encode = encoder();
  cuuint64_t size[most_dimensions] = {}, stride[most_dimensions] = {};
  cuuint32_t shape[most_dimensions] = {}, each[most_dimensions];
  std::copy(dimensions.begin(), dimensions.end(), size);
  std::copy(strides.begin(), strides.end(), stride);
  std::copy(box.begin(), box.end(), shape);
  std::fill_n(each, most_dimensions, 1u);
  CUtensorMap map{};
  const CUresult status = encode(
      &map,
      dtype == Dtype::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      static_cast<cuuint32_t>(dimensions.size()), const_cast<void*>(base), size, stride, shape,
      each, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check(status == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue, "describe expert weights");
  return map;
}

}  // namespace sida::cuda
