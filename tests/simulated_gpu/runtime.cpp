// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "simulated_gpu/driver.hpp"
#include "simulated_gpu/gpu.hpp"

// CUDA's runtime as far as sida and its tests call it, on the simulated GPUs.
using sida::simulated::Driver;
using sida::simulated::Gpu;
using sida::simulated::Memory;
using sida::simulated::StreamId;
using sida::simulated::Work;

struct CUstream_st {
  StreamId id;
};
struct CUevent_st : Gpu::Event {
  int device = 0;
};
struct CUgraph_st {
  Gpu::Graph works;
};
struct CUgraphExec_st {
  Gpu::Graph works;
};

namespace {

thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;
// Of streams that this thread captures: meanwhile it may not allocate, unless it says so.
thread_local int captures = 0;
thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

Gpu& gpu() { return Gpu::get(); }

cudaError_t result(cudaError_t status) {
  if (status != cudaSuccess) last_error = status;
  return status;
}

StreamId id_of(cudaStream_t stream) {
  return stream ? stream->id : gpu().default_stream(current_device);
}
bool is_of_current_device(StreamId stream) { return gpu().device_of(stream) == current_device; }
bool may_not_allocate() { return captures > 0 && capture_mode != cudaStreamCaptureModeRelaxed; }

cudaError_t make_stream(cudaStream_t* stream) {
  *stream = new CUstream_st{gpu().make_stream(current_device)};
  return cudaSuccess;
}

Work copying(std::byte* to, const std::byte* from, std::size_t bytes) {
  return [=](const Memory& memory) {
    std::memcpy(memory.write(to, bytes), memory.read(from, bytes), bytes);
  };
}

bool is_pageable(const void* data) {
  return !gpu().is_device_memory(data) && !gpu().is_pinned(data);
}

cudaError_t copy(void* to, const void* from, std::size_t bytes, StreamId stream) {
  if (bytes == 0) return cudaSuccess;
  if (!to || !from) return result(cudaErrorInvalidValue);
  auto* const target = static_cast<std::byte*>(to);
  const auto* const source = static_cast<const std::byte*>(from);
  if (is_pageable(from)) {  // is taken at once, and may arrive later
    gpu().enqueue(stream, [target, taken = std::vector<std::byte>(source, source + bytes)](
                              const Memory& memory) {
      std::memcpy(memory.write(target, taken.size()), taken.data(), taken.size());
    });
    return cudaSuccess;
  }
  gpu().enqueue(stream, copying(target, source, bytes));
  if (is_pageable(to)) gpu().synchronize(stream);
  return cudaSuccess;
}

}  // namespace

extern "C" {

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
const char* cudaGetErrorName(cudaError_t) { return "simulated"; }
const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaSuccess ? "no error" : "an error of the simulated GPU";
}

cudaError_t cudaDriverGetVersion(int* version) { return *version = Driver::version, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) {
  *count = Driver::counting == cudaSuccess ? Gpu::devices : 0;
  return result(Driver::counting);
}
cudaError_t cudaGetDevice(int* device) { return *device = current_device, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= Gpu::devices) return result(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  std::strncpy(properties->name, "simulated", sizeof(properties->name) - 1);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : 1 << 17;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0, *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return gpu().synchronize(), cudaSuccess; }

cudaError_t cudaMalloc(void** data, std::size_t bytes) {
  if (may_not_allocate()) return result(cudaErrorStreamCaptureUnsupported);
  *data = gpu().allocate(current_device, bytes);
  return *data ? cudaSuccess : result(cudaErrorMemoryAllocation);
}
cudaError_t cudaFree(void* data) {
  return !data || gpu().deallocate(data) ? cudaSuccess : result(cudaErrorInvalidValue);
}
cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
  *free = gpu().free_bytes(current_device), *total = Gpu::device_bytes;
  return cudaSuccess;
}
cudaError_t cudaHostRegister(void* data, std::size_t bytes, unsigned) {
  if (may_not_allocate()) return result(cudaErrorStreamCaptureUnsupported);
  return gpu().pin(data, bytes) ? cudaSuccess : result(cudaErrorHostMemoryAlreadyRegistered);
}
cudaError_t cudaHostUnregister(void* data) {
  return gpu().unpin(data) ? cudaSuccess : result(cudaErrorHostMemoryNotRegistered);
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* data) {
  *attributes = {};
  attributes->type = gpu().is_device_memory(data) ? cudaMemoryTypeDevice
                     : gpu().is_pinned(data)      ? cudaMemoryTypeHost
                                                  : cudaMemoryTypeUnregistered;
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  return copy(to, from, bytes, id_of(stream));
}
cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind) {
  return copy(to, from, bytes, id_of(nullptr));
}
cudaError_t cudaMemset(void* data, int value, std::size_t bytes) {
  gpu().enqueue(id_of(nullptr), [=](const Memory& memory) {
    std::memset(memory.write(static_cast<std::byte*>(data), bytes), value, bytes);
  });
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return make_stream(stream);
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  return make_stream(stream);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  gpu().end_stream(stream->id);
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
  return *id = id_of(stream), cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return gpu().synchronize(id_of(stream)), cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  if (gpu().is_captured(id_of(stream))) return result(cudaErrorStreamCaptureUnsupported);
  return gpu().wait(id_of(stream), *event), cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new CUevent_st{{}, current_device};
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  if (gpu().device_of(id_of(stream)) != event->device)
    return result(cudaErrorInvalidResourceHandle);
  if (gpu().is_captured(id_of(stream))) return result(cudaErrorStreamCaptureUnsupported);
  return gpu().record(id_of(stream), *event), cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  return gpu().is_passed(*event) ? cudaSuccess : result(cudaErrorNotReady);
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  return gpu().synchronize(*event), cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
  if (!gpu().is_passed(*from) || !gpu().is_passed(*to)) return result(cudaErrorNotReady);
  *milliseconds = static_cast<float>((*to->seconds - *from->seconds) * 1e3);
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, capture_mode);
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (!stream || !gpu().begin_capture(stream->id)) return result(cudaErrorIllegalState);
  ++captures;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  auto captured = gpu().end_capture(id_of(stream));
  if (!captured) return result(cudaErrorIllegalState);
  --captures;
  *graph = new CUgraph_st{std::move(*captured)};
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* ready, cudaGraph_t graph, unsigned long long) {
  *ready = new CUgraphExec_st{graph->works};
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  for (const Work& work : graph->works) gpu().enqueue(id_of(stream), work);
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  delete graph;
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}

// A kernel is what simulated_gpu/kernels.cpp says: a Work.
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void**) {
  const StreamId stream = id_of(config->stream);
  if (!is_of_current_device(stream)) return result(cudaErrorInvalidResourceHandle);
  gpu().enqueue(stream, *static_cast<const Work*>(kernel));
  return cudaSuccess;
}
// None of nvcc's kernels is there.
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, std::size_t, cudaStream_t) {
  return result(cudaErrorNotSupported);
}
}
