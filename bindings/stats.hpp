// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/pybind11.h>

#include "sida/cache/cache_stats.hpp"

namespace sida::bindings {

/// The statistics as Python has them: totals, and a list of the same by layer.
pybind11::dict dict_of(const CacheStats& stats);

}  // namespace sida::bindings
