// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdexcept>

#include "sida/core/error.hpp"

namespace sida::cuda {

/// Runs what launches kernels; their errors come as sida's own.
template <class F>
void launched(F&& f) {
  try {
    f();
  } catch (const std::invalid_argument& error) {
    throw InvalidArgument(error.what());
  } catch (const std::runtime_error& error) {
    throw CudaError(error.what());
  }
}

}  // namespace sida::cuda
