// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>

#include "bind.hpp"
#include "errors.hpp"

PYBIND11_MODULE(_core, module) {
  using namespace sida::bindings;
  module.doc() = "The compiled part of sida.";
  module.attr("__version__") = SIDA_VERSION_STRING;
  register_errors(module);
  bind_config(module);
  bind_hash(module);
  bind_store(module);
  bind_cache(module);
  bind_scheduler(module);
  bind_experts(module);
  bind_replay(module);
}
