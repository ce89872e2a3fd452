// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "sida/backend/cpu/dot_kernels_portable.hpp"
#include "sida/backend/cpu/dot_panel.hpp"
#include "sida/backend/cpu/f32_product.hpp"
#include "sida/backend/cpu/isa.hpp"
#include "sida/core/data_type.hpp"
#include "sida/core/half.hpp"
#include "sida/ffn/cpu/activation.hpp"
#include "sida/ffn/cpu/amx_kernels_bf16.hpp"
#include "sida/ffn/cpu/dot_kernels_avx512_bf16.hpp"
#include "sida/ffn/cpu/packed_rows.hpp"

namespace sida::detail {

/// The kernels of one storage type and instruction set. Hidden and intermediate rows are held as
/// `Input`; sums, biases and results are `Real`.
template <class Input, class Real>
struct FfnKernels {
  MultiplyFunction<Input, Real> multiply = nullptr;
  ActivateFunction<Input, Real> activate = nullptr;
  PackFunction<Input> pack = nullptr;  ///< for kernels that read packed rows
  std::int64_t rows_at_once = 48;      ///< rows that share weights in the caches; <= max_block_rows
};

/// True where bf16 rows stay bf16, to be multiplied in pairs.
inline bool has_bf16_products(DataType storage, Isa isa) noexcept {
  return storage == DataType::bf16 && isa >= Isa::avx512_bf16;
}

inline ActivateFunction<float, float> f32_activate(Isa isa) {
#if SIDA_X86_KERNELS
  if (isa >= Isa::avx512) return activate_avx512<float>;
  if (isa == Isa::avx2) return activate_avx2;
#endif
  static_cast<void>(isa);
  return activate_portable;
}

/// Kernels that widen weights of `storage` (f32, f16, bf16) to f32.
inline FfnKernels<float, float> f32_kernels(DataType storage, Isa isa) {
  if (storage == DataType::f16) return {f32_multiply<Half>(isa), f32_activate(isa)};
  if (storage == DataType::bf16) return {f32_multiply<BFloat16>(isa), f32_activate(isa)};
  return {f32_multiply<float>(isa), f32_activate(isa)};
}

/// For has_bf16_products only.
inline FfnKernels<BFloat16, float> bf16_kernels(Isa isa) {
#if SIDA_X86_KERNELS
  if (isa == Isa::amx_bf16)
    return {amx_bf16::multiply, activate_avx512<BFloat16>, amx_bf16::pack, 6 * packed_rows};
  return {multiply_rows<BFloat16, float, avx512_bf16::dot_panel>, activate_avx512<BFloat16>};
#else
  static_cast<void>(isa);
  return {};
#endif
}

inline FfnKernels<double, double> f64_kernels() {
  return {multiply_rows<double, double, portable::dot_panel<double, double>>, activate_f64};
}

}  // namespace sida::detail
