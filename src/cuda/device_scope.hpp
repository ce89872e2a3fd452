// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "sida/core/error.hpp"

namespace sida::cuda {

/// Throws CudaError saying what was tried, unless `status` is success. Clears the thread's last
/// error, so that the next caller does not meet ours.
inline void expect(cudaError_t status, const char* tried) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw CudaError("cuda: could not " + std::string(tried) + ": " + cudaGetErrorName(status) + ", " +
                  cudaGetErrorString(status));
}

/// Makes `device` the thread's current one for as long as it lives.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    expect(cudaGetDevice(&before_), "ask for the current device");
    if (before_ == device) return;
    expect(cudaSetDevice(device), "use the device");
    restore_ = true;
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;
  ~DeviceScope() {
    if (restore_) cudaSetDevice(before_);
  }

 private:
  int before_ = 0;
  bool restore_ = false;
};

}  // namespace sida::cuda
