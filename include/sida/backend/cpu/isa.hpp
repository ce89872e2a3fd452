// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "sida/core/error.hpp"

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
#define SIDA_TARGET_AMX_BF16                                                         \
  __attribute__((                                                                    \
      target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile," \
             "amx-bf16")))

namespace sida {

/// Instruction sets that the CPU kernels are written for, each including the ones before it.
enum class Isa : std::uint8_t { portable, avx2, avx512, avx512_bf16, amx_bf16 };

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
    case Isa::amx_bf16:
      return "amx_bf16";
  }
  return "?";
}

namespace detail {

/// Whether AMX's tiles can multiply bf16. The first call asks Linux for them, for all threads of
/// the process: it hands their 8 KiB of state only to programs that ask.
inline bool may_use_amx_bf16() noexcept {
#if defined(__x86_64__) && defined(__linux__) && defined(SYS_arch_prctl)
  static const bool allowed = [] {
    constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    if (!(d & amx_bf16) || !(d & amx_tile)) return false;
    constexpr long request_permission = 0x1023, tile_data = 18;
    return ::syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  }();
  return allowed;
#else
  return false;
#endif
}

}  // namespace detail

/// The richest instruction set that this processor and operating system run.
/// Every processor with AVX2 and FMA has F16C too.
inline Isa best_isa() noexcept {
#if SIDA_X86_KERNELS
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::portable;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return Isa::avx2;
  if (!__builtin_cpu_supports("avx512bf16")) return Isa::avx512;
  return detail::may_use_amx_bf16() ? Isa::amx_bf16 : Isa::avx512_bf16;
#else
  return Isa::portable;
#endif
}

/// @throws InvalidArgument for an instruction set that this processor or system lacks.
inline void expect_runs(Isa isa) {
  SIDA_EXPECTS(isa <= best_isa(), "isa: expected one that this processor runs (up to " +
                                      std::string(name_of(best_isa())) + "), got " +
                                      std::string(name_of(isa)));
}

}  // namespace sida
