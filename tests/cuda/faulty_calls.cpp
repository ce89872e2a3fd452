// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime_api.h>

#include <cstddef>

#include "support/faults.hpp"

// The linker puts these in the place of CUDA's functions, see CMakeLists.txt: an operation fails
// where Faults says so.
namespace {

using sida::test::Fault;
using sida::test::Faults;

// What a call that failed returns; it is the thread's last error, too, as if the driver said so.
cudaError_t failed(cudaError_t status) {
  cudaSetDevice(-1);  // fails, and leaves the device as it is
  return status;
}

}  // namespace

extern "C" {

#define SIDA_FAULTY(kind, status, name, parameters, arguments) \
  cudaError_t __real_##name parameters;                        \
  cudaError_t __wrap_##name parameters {                       \
    if (Faults::strikes(Fault::kind)) return failed(status);   \
    return __real_##name arguments;                            \
  }

SIDA_FAULTY(allocation, cudaErrorMemoryAllocation, cudaMalloc, (void** data, std::size_t bytes),
            (data, bytes))
SIDA_FAULTY(allocation, cudaErrorMemoryAllocation, cudaHostRegister,
            (void* data, std::size_t bytes, unsigned flags), (data, bytes, flags))
SIDA_FAULTY(copy, cudaErrorInvalidValue, cudaMemcpyAsync,
            (void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
             cudaStream_t stream),
            (to, from, bytes, kind, stream))
SIDA_FAULTY(launch, cudaErrorLaunchOutOfResources, cudaLaunchKernelExC,
            (const cudaLaunchConfig_t* config, const void* kernel, void** arguments),
            (config, kernel, arguments))
// What <<<>>> is compiled to.
SIDA_FAULTY(launch, cudaErrorLaunchOutOfResources, __cudaLaunchKernel,
            (cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, std::size_t shared,
             cudaStream_t stream),
            (kernel, grid, block, arguments, shared, stream))
SIDA_FAULTY(event, cudaErrorMemoryAllocation, cudaEventCreateWithFlags,
            (cudaEvent_t * event, unsigned flags), (event, flags))
SIDA_FAULTY(event, cudaErrorInvalidResourceHandle, cudaEventRecord,
            (cudaEvent_t event, cudaStream_t stream), (event, stream))
SIDA_FAULTY(event, cudaErrorInvalidResourceHandle, cudaEventQuery, (cudaEvent_t event), (event))
SIDA_FAULTY(event, cudaErrorInvalidResourceHandle, cudaStreamWaitEvent,
            (cudaStream_t stream, cudaEvent_t event, unsigned flags), (stream, event, flags))
SIDA_FAULTY(event, cudaErrorInvalidResourceHandle, cudaStreamGetId,
            (cudaStream_t stream, unsigned long long* id), (stream, id))
SIDA_FAULTY(event, cudaErrorMemoryAllocation, cudaStreamCreateWithFlags,
            (cudaStream_t * stream, unsigned flags), (stream, flags))
SIDA_FAULTY(event, cudaErrorMemoryAllocation, cudaStreamCreateWithPriority,
            (cudaStream_t * stream, unsigned flags, int priority), (stream, flags, priority))

// Waits all the same: work that cannot be waited for has ended.
cudaError_t __real_cudaEventSynchronize(cudaEvent_t event);
cudaError_t __wrap_cudaEventSynchronize(cudaEvent_t event) {
  const cudaError_t status = __real_cudaEventSynchronize(event);
  return Faults::strikes(Fault::event) ? failed(cudaErrorLaunchFailure) : status;
}
}
