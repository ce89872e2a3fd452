// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include "device_scope.hpp"

namespace sida::cuda {

/// While it lives, this thread may allocate although a stream of its own is being captured, which
/// CUDA forbids otherwise since an allocation might wait for the stream.
class RelaxedCapture {
 public:
  RelaxedCapture() {
    expect(cudaThreadExchangeStreamCaptureMode(&mode_), "allocate while a CUDA graph is captured");
  }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;  // then the one before
};

}  // namespace sida::cuda
