// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "engine.hpp"

namespace sida::bindings {

/// What this module gives to sida._core.
extern const CudaPart part;

}  // namespace sida::bindings
