// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

#include "support/faults.hpp"

namespace sida::test {

/// @throws std::runtime_error with CUDA's reason.
inline void check_cuda(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

/// Whether there is a GPU; says so where there is none.
inline bool gpu_found() {
  int devices = 0;
  const cudaError_t status = cudaGetDeviceCount(&devices);
  if (status == cudaSuccess && devices > 0) return true;
  std::cout << "skipped: no GPU (" << cudaGetErrorString(status) << ")\n";
  return false;
}

/// Waits for the device. @throws std::runtime_error for anything that went wrong on it.
inline void synchronize() { check_cuda(cudaDeviceSynchronize()); }

inline void copy_to_host(void* to, const void* from, std::size_t bytes) {
  check_cuda(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost));
}

/// Waits for what was enqueued on the default stream. Copies of few bytes from memory that is not
/// pinned, and fills, may be under way when their calls return, and other streams do not wait.
inline void wait_for_default_stream() {
  const FaultsExempt exempt;
  check_cuda(cudaStreamSynchronize(nullptr));
}

inline void copy_to_device(std::byte* to, const std::vector<std::byte>& bytes) {
  check_cuda(cudaMemcpy(to, bytes.data(), bytes.size(), cudaMemcpyHostToDevice));
  wait_for_default_stream();
}

/// Device memory that it owns.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  ~DeviceBuffer() { cudaFree(data_); }

  std::byte* data() const { return data_; }

  /// Holds a copy of `bytes`.
  void fill(const std::vector<std::byte>& bytes) {
    allocate(bytes.size());
    copy_to_device(data_, bytes);
  }

  /// Holds `bytes` bytes, each number in them a NaN (or -1).
  void poison(std::size_t bytes) {
    allocate(bytes);
    check_cuda(cudaMemset(data_, 0xff, bytes));
    wait_for_default_stream();
  }

 private:
  void allocate(std::size_t bytes) {
    const FaultsExempt exempt;
    check_cuda(cudaFree(data_));
    data_ = nullptr;
    check_cuda(cudaMalloc(reinterpret_cast<void**>(&data_), bytes ? bytes : 1));
  }

  std::byte* data_ = nullptr;
};

}  // namespace sida::test
