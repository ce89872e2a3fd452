// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "engine.hpp"

namespace sida::bindings {

extern const CudaPart cuda_part;

}  // namespace sida::bindings
