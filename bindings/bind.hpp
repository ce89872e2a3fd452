// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/pybind11.h>

namespace sida::bindings {

// One function a class or group of classes, each in the file of its name, called in the order of
// the data flow.
void bind_config(pybind11::module_& module);
void bind_hash(pybind11::module_& module);
void bind_store(pybind11::module_& module);
void bind_cache(pybind11::module_& module);
void bind_scheduler(pybind11::module_& module);
void bind_experts(pybind11::module_& module);
void bind_replay(pybind11::module_& module);

}  // namespace sida::bindings
