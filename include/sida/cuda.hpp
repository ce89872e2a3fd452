// SPDX-License-Identifier: Apache-2.0
#pragma once

// The CUDA backend, beside sida/sida.hpp; link sida::cuda. Without CUDA's headers.
#include "sida/backend/cuda_backend.hpp"
#include "sida/cache/pinned_layers.hpp"
#include "sida/cache/pinned_store.hpp"
#include "sida/ffn/expert_ffn_cuda.hpp"
#include "sida/ffn/kernel_table.hpp"
#include "sida/hash/hash_predictor_cuda.hpp"
#include "sida/schedule/slab_loader_cuda.hpp"
