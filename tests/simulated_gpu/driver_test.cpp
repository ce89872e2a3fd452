// SPDX-License-Identifier: Apache-2.0
#include "simulated_gpu/driver.hpp"

#include <cuda_runtime_api.h>

#include <string>

#include "sida/backend/cuda_backend.hpp"
#include "sida/core/error.hpp"
#include "support/catch.hpp"

using sida::CudaBackend;
using sida::simulated::Driver;

namespace {

/// What a user is told where counting GPUs ends so, with a driver for this version.
std::string told(cudaError_t status, int version) {
  Driver::counting = status;
  Driver::version = version;
  std::string message = "nothing";
  try {
    CudaBackend();
  } catch (const sida::CudaError& error) {
    message = error.what();
  }
  CHECK(CudaBackend::devices() == 0);
  CHECK(cudaGetLastError() == cudaSuccess);
  Driver::counting = cudaSuccess;
  return message;
}

}  // namespace

TEST_CASE("Without a driver, with an old one, or without a GPU the user is told what to do") {
  CHECK(told(cudaErrorInsufficientDriver, 0) ==
        "cuda: there is no NVIDIA driver; install one, or use device='cpu'");
  CHECK(told(cudaErrorInsufficientDriver, 12020) ==
        "cuda: expected a driver for CUDA 13 or later, got one for CUDA 12.2; update the driver, "
        "or use device='cpu'");
  CHECK(told(cudaErrorNoDevice, 13000) ==
        "cuda: the driver finds no GPU (is CUDA_VISIBLE_DEVICES empty?); use device='cpu'");
  CHECK(told(cudaErrorSystemNotReady, 13000).starts_with("cuda: could not count the GPUs: "));
  CHECK_NOTHROW(CudaBackend());
}
