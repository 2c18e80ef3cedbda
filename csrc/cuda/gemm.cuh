// What a matrix product on sm_90 is made of: tensor maps for the copy engine, and the warp-group product of a tile of
// 64 rows. PTX ISA, "cp.async.bulk.tensor", "wgmma". Operands lie in shared memory as the copy engine's 128-byte
// swizzle puts them: 128 bytes of K a row, 8 rows a pattern.
#pragma once
#include <cuda.h>

#include "bulk.cuh"
#include "vec.cuh"

namespace tpf {

constexpr int kSwizzleBytes = 128;  // of K, in a row of an operand

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A box of the tensor, `x` along its rows (elements), `y` down, into shared memory.
__device__ inline void tensor_load(void* shared, const CUtensorMap* map, int x, int y, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
          "r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y)
      : "memory");
}

__device__ inline void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Where an operand begins; `byte` (a multiple of 32, below 128) is a step along K.
__device__ inline uint64_t operand(uint32_t shared, int byte) {
  constexpr uint64_t kPatternBytes = 8 * kSwizzleBytes, kSwizzle128 = uint64_t{1} << 62, kUnused = uint64_t{1} << 16;
  return kSwizzle128 | (kPatternBytes >> 4) << 32 | kUnused | ((shared + byte) & 0x3ffff) >> 4;
}

__device__ inline void product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ inline void product_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving accesses to the sums over an asynchronous product.
template <int kSums>
__device__ inline void hold(float (&sums)[kSums]) {
#pragma unroll
  for (int i = 0; i < kSums; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// clang-format off
#define TPF_SUMS_8(i)                                                                                          \
  "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), "+f"(sums[i + 5]), \
      "+f"(sums[i + 6]), "+f"(sums[i + 7])
#define TPF_SUMS_96                                                                                             \
  TPF_SUMS_8(0), TPF_SUMS_8(8), TPF_SUMS_8(16), TPF_SUMS_8(24), TPF_SUMS_8(32), TPF_SUMS_8(40), TPF_SUMS_8(48), \
      TPF_SUMS_8(56), TPF_SUMS_8(64), TPF_SUMS_8(72), TPF_SUMS_8(80), TPF_SUMS_8(88)
#define TPF_WGMMA(types, trailer)                                                            \
  asm volatile(                                                                                  \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %98, 0;\n"                                               \
      "wgmma.mma_async.sync.aligned.m64n192" types " {"                                          \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                  \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "        \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "        \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "        \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "        \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, "       \
      "%96, %97, p, " trailer ";\n}\n"                                                           \
      : TPF_SUMS_96                                                                              \
      : "l"(a), "l"(b), "r"(static_cast<int>(add)))
// clang-format on

// sums (+)= a b^T over 32 bytes of K: `add` false begins anew. Thread t of the warp group holds rows t/32*16 + t%32/4
// and 8 below: sums[4*j], [4*j+1] at columns 8*j + t%4*2 and next, sums[4*j+2], [4*j+3] likewise of the lower row.
__device__ inline void multiply(float (&sums)[96], uint64_t a, uint64_t b, bool add, __nv_bfloat16) {
  TPF_WGMMA("k16.f32.bf16.bf16", "1, 1, 0, 0");
}
__device__ inline void multiply(float (&sums)[96], uint64_t a, uint64_t b, bool add, __half) {
  TPF_WGMMA("k16.f32.f16.f16", "1, 1, 0, 0");
}
__device__ inline void multiply(float (&sums)[96], uint64_t a, uint64_t b, bool add, __nv_fp8_e4m3) {
  TPF_WGMMA("k32.f32.e4m3.e4m3", "1, 1");
}

#undef TPF_WGMMA
#undef TPF_SUMS_96
#undef TPF_SUMS_8

template <int kRegisters>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

#endif

}  // namespace tpf
