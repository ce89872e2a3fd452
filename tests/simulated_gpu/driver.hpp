// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

namespace sida::simulated {

/// What the driver says when GPUs are counted, and for which version of CUDA it is.
struct Driver {
  inline static cudaError_t counting = cudaSuccess;
  inline static int version = 13000;
};

}  // namespace sida::simulated
