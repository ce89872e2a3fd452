// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/pybind11.h>

#include "sida/cache/budget.hpp"

namespace sida::bindings {

/// The budget that Python's `memory` means: an int is bytes, a float a fraction, a str is parsed.
Budget budget_of(const pybind11::handle& memory);

}  // namespace sida::bindings
