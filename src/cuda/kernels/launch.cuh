// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include "launch.hpp"

namespace sida::cuda {

/// Enqueues a kernel with `shared` bytes of dynamic shared memory, in clusters of `cluster` blocks,
/// that calls wait_for_previous() before it touches what earlier kernels write.
template <class... Parameters, class... Arguments>
void launch_clusters(const char* what, void (*kernel)(Parameters...), unsigned cluster, dim3 grid,
                     dim3 block, std::size_t shared, cudaStream_t stream,
                     const Arguments&... arguments) {
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {cluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = attributes;
  // Later ones may be set up early.
  config.numAttrs = compute_capability() < 9 ? 0 : cluster == 1 ? 1 : 2;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), what);
}

/// The same without clusters.
template <class... Parameters, class... Arguments>
void launch_shared(const char* what, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                   std::size_t shared, cudaStream_t stream, const Arguments&... arguments) {
  launch_clusters(what, kernel, 1, grid, block, shared, stream, arguments...);
}

/// The same without dynamic shared memory.
template <class... Parameters, class... Arguments>
void launch(const char* what, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            cudaStream_t stream, const Arguments&... arguments) {
  launch_shared(what, kernel, grid, block, 0, stream, arguments...);
}

/// Waits until all kernels enqueued before have finished and their writes are visible. Each thread
/// of each block calls it, so that what finished before the previous kernel is finished too.
__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// Lets the next kernel be set up as soon as there is room for it.
__device__ inline void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace sida::cuda
