// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "sida/backend/cuda_backend.hpp"
#include "sida/core/moe_config.hpp"

namespace sida {

/// The kernel for calls of one layer's shape on a GPU: those whose tokens, rounded up to a power of
/// two, are `tokens` rounded up so.
struct KernelChoice {
  DataType dtype = DataType::f32;
  bool gated = false;
  std::int32_t top_k = 1, experts = 1, hidden_size = 1, intermediate_size = 1, tokens = 1;
  std::string kernel;  ///< one of kernel_names()

  friend bool operator==(const KernelChoice&, const KernelChoice&) = default;
};

/// Kernels that were measured on GPUs of one model, by what CudaBackend::device_name() calls it.
/// Calls of shapes that are not in it go by the table that sida is built with.
struct KernelTable {
  std::string gpu;
  std::vector<KernelChoice> choices;

  friend bool operator==(const KernelTable&, const KernelTable&) = default;
};

/// The kernels of sida::cuda.
std::vector<std::string> kernel_names();

/// Has layers on this GPU go by `table`, until the process ends. Call it before the first of them,
/// and before what follows: results depend on the kernel, and must not change on the way.
/// @throws InvalidArgument for a table of another GPU, an unknown kernel, a dtype other than f32,
/// f16 and bf16; StateError after another table, or a layer.
void use_kernels(const CudaBackend& backend, const KernelTable& table);

/// The kernel that calls of so many tokens run with, by the tables.
/// @throws InvalidArgument as ExpertFfn<CudaBackend>.
std::string kernel_of(const CudaBackend& backend, const MoeConfig& config, std::int32_t tokens);

/// How long calls took with one kernel.
struct KernelTimes {
  std::string kernel;
  std::vector<double> microseconds;  ///< the i-th of all kernels on the same routing
};

/// Measures the kernels that take the shape, in turns, in CUDA graphs, on random experts that are
/// not in L2, with uniform routing that is new in each turn. Those that take more than three times
/// as long as the fastest are left out, unless it is the one of kernel_of(). Takes the memory of
/// all experts of one layer, and gives it back.
/// @throws InvalidArgument as ExpertFfn<CudaBackend>, or for less than one token or repetition;
/// OutOfMemory; CudaError.
std::vector<KernelTimes> time_kernels(CudaBackend& backend, const MoeConfig& config,
                                      std::int32_t tokens, int repetitions, std::uint32_t seed = 0);

}  // namespace sida
