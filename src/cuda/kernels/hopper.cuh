// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda.h>

#include <type_traits>

#include "copies.cuh"
#include "element.cuh"

/// The instructions of Hopper that the grouped product uses: mbarriers, tensor copies, wgmma.
namespace sida::cuda::hopper {

__device__ inline void init_barrier(std::uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}

__device__ inline void arrive(std::uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

/// Arrives, and has the barrier wait for `bytes` of tensor copies too.
__device__ inline void arrive_expecting(std::uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

/// Arrives once the thread's copies so far are done.
__device__ inline void arrive_after_copies(std::uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

__device__ inline void wait(std::uint64_t* barrier, unsigned parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

/// The number of this block in its cluster.
__device__ inline unsigned rank_in_cluster() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

/// Where `pointer`'s place is in the shared memory of the cluster's block `rank`.
__device__ inline unsigned address_in(unsigned rank, const void* pointer) {
  unsigned address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(address)
               : "r"(shared_address(pointer)), "r"(rank));
  return address;
}

/// Arrives at the barrier of the cluster's block `rank`. What it stored before is not for that
/// block to read: a release to a cluster takes as long as one to the whole device.
__device__ inline void arrive_in(unsigned rank, std::uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address_in(rank, barrier))
               : "memory");
}

/// Stores to the place of `to` in the cluster's block `rank`, whose barrier expects 4 bytes for it.
__device__ inline void store_in(unsigned rank, int* to, int value, std::uint64_t* barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.s32 [%0], %1, [%2];" ::"r"(
                   address_in(rank, to)),
               "r"(value), "r"(address_in(rank, barrier))
               : "memory");
}

/// Waits until all threads of the cluster are here; what they wrote is not for others to read.
__device__ inline void meet_cluster() {
  asm volatile(
      "barrier.cluster.arrive.relaxed;\n"
      "barrier.cluster.wait;" ::
          : "memory");
}

/// Lets the cluster and copies see barriers that were initialised.
__device__ inline void fence_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void copy_tile(void* to, const CUtensorMap& map, int column, int row,
                                 std::uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
      "%3}], [%4];" ::"r"(shared_address(to)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

__device__ inline void copy_tile(void* to, const CUtensorMap& map, int column, int row, int slot,
                                 std::uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
      "%3, %4}], [%5];" ::"r"(shared_address(to)),
      "l"(&map), "r"(column), "r"(row), "r"(slot), "r"(shared_address(barrier))
      : "memory");
}

/// The same into the first two blocks of the cluster; each one's barrier is told.
__device__ inline void copy_tile_to_both(void* to, const CUtensorMap& map, int column, int row,
                                         int slot, std::uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(shared_address(to)),
      "l"(&map), "r"(column), "r"(row), "r"(slot), "r"(shared_address(barrier)),
      "h"(static_cast<unsigned short>(3))
      : "memory");
}

/// How copies are kept in L2: with `once` they are the first to leave it.
__device__ inline std::uint64_t kept(bool once) {
  std::uint64_t policy;
  if (once)
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  else
    asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ inline void copy_tile(void* to, const CUtensorMap& map, int column, int row, int slot,
                                 std::uint64_t* barrier, std::uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(shared_address(to)),
      "l"(&map), "r"(column), "r"(row), "r"(slot), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}

/// Of a tensor whose rows lie in groups of eight, and those in two halves.
__device__ inline void copy_groups(void* to, const CUtensorMap& map, int column, int group,
                                   int slot, std::uint64_t* barrier, std::uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3, %3, %4, %5}], [%6], %7;" ::"r"(shared_address(to)),
      "l"(&map), "r"(column), "r"(0), "r"(group), "r"(slot), "r"(shared_address(barrier)),
      "l"(policy)
      : "memory");
}

/// Lets tensor cores see what copies and stores have written to shared memory.
__device__ inline void fence_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/// wgmma's view of a matrix in shared memory whose rows are 128 bytes, swizzled by 128 bytes.
__device__ inline std::uint64_t matrix(const void* start) {
  return static_cast<std::uint64_t>((shared_address(start) & 0x3ffff) >> 4) |
         std::uint64_t{1} << 16 | std::uint64_t{64} << 32 | std::uint64_t{1} << 62;
}

__device__ inline void begin_multiply() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void end_multiply() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/// Waits until at most `pending` groups of products are under way.
template <int pending>
__device__ void wait_multiply() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// The registers of one instruction, by its number of columns. Each thread holds half as many sums.
// clang-format off
#define SIDA_REGISTERS_8 \
  "%0, %1, %2, %3, %4, %5, %6, %7"
#define SIDA_REGISTERS_32 \
  SIDA_REGISTERS_8 ", " \
  "%8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define SIDA_REGISTERS_64 \
  SIDA_REGISTERS_32 ", " \
  "%32, %33, %34, %35, %36, %37, %38, %39, " \
  "%40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, " \
  "%56, %57, %58, %59, %60, %61, %62, %63"
#define SIDA_REGISTERS_128 \
  SIDA_REGISTERS_64 ", " \
  "%64, %65, %66, %67, %68, %69, %70, %71, " \
  "%72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, " \
  "%88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, " \
  "%104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, " \
  "%120, %121, %122, %123, %124, %125, %126, %127"
#define SIDA_SUMS_8 \
  "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]), \
  "+f"(sums[4]), "+f"(sums[5]), "+f"(sums[6]), "+f"(sums[7])
#define SIDA_SUMS_32 \
  SIDA_SUMS_8, \
  "+f"(sums[8]), "+f"(sums[9]), "+f"(sums[10]), "+f"(sums[11]), \
  "+f"(sums[12]), "+f"(sums[13]), "+f"(sums[14]), "+f"(sums[15]), \
  "+f"(sums[16]), "+f"(sums[17]), "+f"(sums[18]), "+f"(sums[19]), \
  "+f"(sums[20]), "+f"(sums[21]), "+f"(sums[22]), "+f"(sums[23]), \
  "+f"(sums[24]), "+f"(sums[25]), "+f"(sums[26]), "+f"(sums[27]), \
  "+f"(sums[28]), "+f"(sums[29]), "+f"(sums[30]), "+f"(sums[31])
#define SIDA_SUMS_64 \
  SIDA_SUMS_32, \
  "+f"(sums[32]), "+f"(sums[33]), "+f"(sums[34]), "+f"(sums[35]), \
  "+f"(sums[36]), "+f"(sums[37]), "+f"(sums[38]), "+f"(sums[39]), \
  "+f"(sums[40]), "+f"(sums[41]), "+f"(sums[42]), "+f"(sums[43]), \
  "+f"(sums[44]), "+f"(sums[45]), "+f"(sums[46]), "+f"(sums[47]), \
  "+f"(sums[48]), "+f"(sums[49]), "+f"(sums[50]), "+f"(sums[51]), \
  "+f"(sums[52]), "+f"(sums[53]), "+f"(sums[54]), "+f"(sums[55]), \
  "+f"(sums[56]), "+f"(sums[57]), "+f"(sums[58]), "+f"(sums[59]), \
  "+f"(sums[60]), "+f"(sums[61]), "+f"(sums[62]), "+f"(sums[63])
#define SIDA_SUMS_128 \
  SIDA_SUMS_64, \
  "+f"(sums[64]), "+f"(sums[65]), "+f"(sums[66]), "+f"(sums[67]), \
  "+f"(sums[68]), "+f"(sums[69]), "+f"(sums[70]), "+f"(sums[71]), \
  "+f"(sums[72]), "+f"(sums[73]), "+f"(sums[74]), "+f"(sums[75]), \
  "+f"(sums[76]), "+f"(sums[77]), "+f"(sums[78]), "+f"(sums[79]), \
  "+f"(sums[80]), "+f"(sums[81]), "+f"(sums[82]), "+f"(sums[83]), \
  "+f"(sums[84]), "+f"(sums[85]), "+f"(sums[86]), "+f"(sums[87]), \
  "+f"(sums[88]), "+f"(sums[89]), "+f"(sums[90]), "+f"(sums[91]), \
  "+f"(sums[92]), "+f"(sums[93]), "+f"(sums[94]), "+f"(sums[95]), \
  "+f"(sums[96]), "+f"(sums[97]), "+f"(sums[98]), "+f"(sums[99]), \
  "+f"(sums[100]), "+f"(sums[101]), "+f"(sums[102]), "+f"(sums[103]), \
  "+f"(sums[104]), "+f"(sums[105]), "+f"(sums[106]), "+f"(sums[107]), \
  "+f"(sums[108]), "+f"(sums[109]), "+f"(sums[110]), "+f"(sums[111]), \
  "+f"(sums[112]), "+f"(sums[113]), "+f"(sums[114]), "+f"(sums[115]), \
  "+f"(sums[116]), "+f"(sums[117]), "+f"(sums[118]), "+f"(sums[119]), \
  "+f"(sums[120]), "+f"(sums[121]), "+f"(sums[122]), "+f"(sums[123]), \
  "+f"(sums[124]), "+f"(sums[125]), "+f"(sums[126]), "+f"(sums[127])
#define SIDA_MULTIPLY(columns, type, registers, sums_of, a, b, add) \
  asm volatile( \
      "{\n.reg .pred add;\nsetp.ne.b32 add, %" add ", 0;\n" \
      "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" registers "}, %" \
      a ", %" b ", add, 1, 1, 0, 0;\n}" \
      : sums_of \
      : "l"(rows), "l"(columns_at), "r"(adds))
#define SIDA_MULTIPLY_COLUMNS(type) \
  if constexpr (columns == 16) \
    SIDA_MULTIPLY("16", type, SIDA_REGISTERS_8, SIDA_SUMS_8, "8", "9", "10"); \
  else if constexpr (columns == 64) \
    SIDA_MULTIPLY("64", type, SIDA_REGISTERS_32, SIDA_SUMS_32, "32", "33", "34"); \
  else if constexpr (columns == 128) \
    SIDA_MULTIPLY("128", type, SIDA_REGISTERS_64, SIDA_SUMS_64, "64", "65", "66"); \
  else \
    SIDA_MULTIPLY("256", type, SIDA_REGISTERS_128, SIDA_SUMS_128, "128", "129", "130")
// clang-format on

/// sums (64 rows x columns) = (adds ? sums : 0) + rows (64 x 16) * columns_at (columns x 16)^T, for
/// 16, 64, 128 or 256 columns; further sums are left as they are.
template <class Element, int columns, int held>
__device__ void multiply(float (&sums)[held], std::uint64_t rows, std::uint64_t columns_at,
                         int adds) {
  static_assert(held >= columns / 2);
  static_assert(columns == 16 || columns == 64 || columns == 128 || columns == 256);
  if constexpr (std::is_same_v<Element, __half>) {
    SIDA_MULTIPLY_COLUMNS("f16");
  } else {
    SIDA_MULTIPLY_COLUMNS("bf16");
  }
}
#undef SIDA_REGISTERS_8
#undef SIDA_REGISTERS_32
#undef SIDA_REGISTERS_64
#undef SIDA_REGISTERS_128
#undef SIDA_SUMS_8
#undef SIDA_SUMS_32
#undef SIDA_SUMS_64
#undef SIDA_SUMS_128
#undef SIDA_MULTIPLY_COLUMNS
#undef SIDA_MULTIPLY

/// Where a block is in its ring of stages.
template <int stages>
struct Turn {
  int stage = 0;
  unsigned parity = 0;
  __device__ void next() {
    if (++stage < stages) return;
    stage = 0;
    parity ^= 1;
  }
};

/// Moves registers from the warps that copy to those that multiply.
template <int registers>
__device__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
__device__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

}  // namespace sida::cuda::hopper
