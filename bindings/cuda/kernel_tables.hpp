// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "sida/backend/cuda_backend.hpp"

namespace sida::bindings {

/// The GPU that "cuda" or "cuda:1" names, whose layers go by the user's table of kernels, where
/// there is one: read once a process. `may_lack`: also where SIDA_KERNEL_TABLE names a file that is
/// yet to be made. @throws InvalidArgument, CudaError; IoError for a file that is damaged.
CudaBackend open_gpu(const std::string& device, bool may_lack = false);

/// What `sida tune` measures with.
void bind_kernel_tables(pybind11::module_& module);

}  // namespace sida::bindings
