// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "sida/backend/cpu/dot_kernels_avx2.hpp"
#include "sida/backend/cpu/dot_kernels_avx512.hpp"
#include "sida/backend/cpu/dot_kernels_portable.hpp"
#include "sida/backend/cpu/dot_panel.hpp"
#include "sida/backend/cpu/isa.hpp"

namespace sida::detail {

/// The product of f32 rows with weights of f32, f16 or bf16, summed in f32, for an instruction set.
template <class Weight>
MultiplyFunction<float, float> f32_multiply(Isa isa) {
#if SIDA_X86_KERNELS
  if (isa >= Isa::avx512) return multiply_rows<float, float, avx512::dot_panel<Weight>>;
  if (isa == Isa::avx2) return multiply_rows<float, float, avx2::dot_panel<Weight>>;
#endif
  static_cast<void>(isa);
  return multiply_rows<float, float, portable::dot_panel<Weight, float>>;
}

}  // namespace sida::detail
