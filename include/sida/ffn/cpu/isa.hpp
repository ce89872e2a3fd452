// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string_view>

/// 1 where the x86-64 kernels are compiled; elsewhere only the portable path exists.
#if defined(__x86_64__) && defined(__GNUC__)
#define SIDA_X86_KERNELS 1
#else
#define SIDA_X86_KERNELS 0
#endif

/// What the functions of each instruction set are compiled for, whatever the compiler's own flags.
#define SIDA_TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define SIDA_TARGET_AVX512 \
  __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")))
#define SIDA_TARGET_AVX512_BF16 \
  __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))

namespace sida {

/// Instruction sets that the CPU kernels are written for, each including the ones before it.
enum class Isa : std::uint8_t { portable, avx2, avx512, avx512_bf16 };

constexpr std::string_view name_of(Isa isa) noexcept {
  switch (isa) {
    case Isa::portable:
      return "portable";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512_bf16:
      return "avx512_bf16";
  }
  return "?";
}

/// The richest instruction set that this processor and operating system run.
/// Every processor with AVX2 and FMA has F16C too.
inline Isa best_isa() noexcept {
#if SIDA_X86_KERNELS
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::portable;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return Isa::avx2;
  return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
#else
  return Isa::portable;
#endif
}

}  // namespace sida
