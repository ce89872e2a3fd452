// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>

#include <chrono>
#include <cstddef>

#include "cuda_cache.hpp"
#include "kernel_tables.hpp"
#include "sida/backend/buffer.hpp"
#include "sida/backend/cuda_backend.hpp"

namespace {

// Bytes a second from pinned memory to the GPU: 64 MiB, copied 16 times.
double copy_rate(int device) {
  const pybind11::gil_scoped_release unlocked;
  constexpr std::size_t bytes = std::size_t{64} << 20;
  constexpr int copies = 16;
  sida::CudaBackend backend(device);
  const sida::PinnedBuffer from(backend, bytes);
  const sida::Buffer<sida::CudaBackend> to(backend, bytes);
  auto stream = backend.make_stream();
  backend.copy_async(to.data(), from.data(), bytes, stream);
  backend.synchronize(backend.fence(stream));
  const auto begin = std::chrono::steady_clock::now();
  for (int copy = 0; copy < copies; ++copy)
    backend.copy_async(to.data(), from.data(), bytes, stream);
  backend.synchronize(backend.fence(stream));
  const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begin;
  return static_cast<double>(bytes) * copies / taken.count();
}

}  // namespace

// What sida._core reaches GPUs through. It is loaded when a GPU is asked for, and has no classes of
// its own: those of sida._core stand for every backend.
PYBIND11_MODULE(_cuda, module) {
  namespace py = pybind11;
  module.doc() = "The part of sida that needs CUDA.";
  py::module_::import("sida._core");
  module.attr("_part") = py::capsule(&sida::bindings::part, "sida.CudaPart");
  module.def("copy_rate", &copy_rate, py::arg("device"),
             "Bytes a second from pinned memory to the GPU, measured. Raises CudaError.");
  module.def("devices", &sida::CudaBackend::devices, "The number of GPUs; 0 without a driver.");
  sida::bindings::bind_kernel_tables(module);
}
