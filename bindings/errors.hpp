// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/pybind11.h>

namespace sida::bindings {

/// Registers how sida's exceptions appear in Python: ValueError, IndexError and MemoryError come
/// from their standard bases, here are the others.
void register_errors(pybind11::module_& module);

}  // namespace sida::bindings
