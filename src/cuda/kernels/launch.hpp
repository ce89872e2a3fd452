// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace sida::cuda {

/// @throws std::runtime_error naming `what` and CUDA's reason. Clears the thread's last error, so
/// that the next launch does not meet this one's.
inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string(what) + ": CUDA reports " + cudaGetErrorString(status));
}

/// The number of the current device.
inline int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "find the current device");
  return device;
}

/// An attribute of the current device.
inline int device_attribute(cudaDeviceAttr attribute) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, current_device()),
        "read an attribute of the device");
  return value;
}

/// Bytes of dynamic shared memory that a block may have beside 1 KiB of its own, where it asks.
inline int shared_memory_room() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - 1024;
}

/// The first number of the device's compute capability: 9 is Hopper.
inline int compute_capability() { return device_attribute(cudaDevAttrComputeCapabilityMajor); }

}  // namespace sida::cuda
