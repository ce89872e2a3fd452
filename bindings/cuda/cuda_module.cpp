// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>

#include "cuda_cache.hpp"
#include "sida/backend/cuda_backend.hpp"

// What sida._core reaches GPUs through. It is loaded when a GPU is asked for, and has no classes of
// its own: those of sida._core stand for every backend.
PYBIND11_MODULE(_cuda, module) {
  namespace py = pybind11;
  module.doc() = "The part of sida that needs CUDA.";
  py::module_::import("sida._core");
  module.attr("_part") = py::capsule(&sida::bindings::part, "sida.CudaPart");
  module.def("devices", &sida::CudaBackend::devices, "The number of GPUs; 0 without a driver.");
}
