// SPDX-License-Identifier: Apache-2.0
#pragma once

struct CUstream_st;

namespace sida::bindings {

/// Of a GPU, in whose order arrays are read and written; null is the legacy default stream.
using Stream = CUstream_st*;

/// Where arrays are to lie, and in which order they are used.
struct Place {
  int cuda_device = -1;  ///< -1: in RAM
  Stream stream = nullptr;
};

}  // namespace sida::bindings
