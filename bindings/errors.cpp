// SPDX-License-Identifier: Apache-2.0
#include "errors.hpp"

#include <exception>

#include "sida/core/error.hpp"

namespace sida::bindings {

void register_errors(pybind11::module_& module) {
  pybind11::register_exception<CudaError>(module, "CudaError", PyExc_RuntimeError);
  pybind11::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const IoError& error) {
      PyErr_SetString(PyExc_OSError, error.what());
    } catch (const StateError& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
    }
  });
}

}  // namespace sida::bindings
