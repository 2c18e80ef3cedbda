// What a matrix product on sm_90 is made of: tensor maps for TMA, and the warp-group product of a tile of
// 64 rows. PTX ISA, "cp.async.bulk.tensor", "wgmma". Operands lie in shared memory as TMA's 128-byte
// swizzle puts them: 128 bytes of K a row, 8 rows a pattern.
#pragma once
#include <cuda.h>

#include "../../plan/tiles.h"
#include "../comm/bulk_copier.cuh"
#include "../ptx/vec.cuh"

namespace tpf {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A box of the tensor, `x` along its rows (elements), `y` down, into shared memory.
__device__ inline void tensor_load(uint32_t shared, const CUtensorMap* map, int x, int y, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
          "r"(shared),
      "l"(map), "r"(barrier), "r"(x), "r"(y)
      : "memory");
}

__device__ inline void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// An operand that begins at this address of shared memory; along K it goes on kOperandStep further.
__device__ inline uint64_t operand(uint32_t address) {
  constexpr uint64_t kPatternBytes = 8 * kSwizzleBytes, kSwizzle128 = uint64_t{1} << 62, kUnused = uint64_t{1} << 16;
  return kSwizzle128 | (kPatternBytes >> 4) << 32 | kUnused | address >> 4;
}
constexpr int kProductBytes = 32;  // of K, in one product
constexpr uint64_t kOperandStep = kProductBytes >> 4;

// From the columns on that a thread's accumulator number `acc` belongs to.
__device__ inline uint64_t columns_further(uint64_t operand, int acc) {
  return operand + 2 * acc * (kSwizzleBytes >> 4);
}

// All threads of the block's two warp groups that multiply.
__device__ inline void products_sync() { asm volatile("bar.sync 1, 256;" ::: "memory"); }

// Ping-pong: one warp group multiplies while the other one promotes. It waits until the other one signals.
__device__ inline void ping_pong_wait(int group) { asm volatile("bar.sync %0, 256;" ::"r"(2 + group) : "memory"); }
__device__ inline void ping_pong_signal(int group) { asm volatile("bar.arrive %0, 256;" ::"r"(2 + group) : "memory"); }

__device__ inline void product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ inline void product_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving accesses to the accumulators over an asynchronous product.
template <int kAccumulators>
__device__ inline void hold(float (&acc)[kAccumulators]) {
#pragma unroll
  for (int i = 0; i < kAccumulators; ++i) asm volatile("" : "+f"(acc[i])::"memory");
}

// multiply: acc (+)= a b^T, 64 rows of a by 2 held rows of b, over kProductBytes of K; `add` false begins anew.
// Thread t of the warp group holds rows t/32*16 + t%32/4 and 8 below: acc[4*j], [4*j+1] at columns 8*j + t%4*2 and
// next, acc[4*j+2], [4*j+3] likewise of the lower row.
// clang-format off
#define TPF_ACC_4(i) "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3])
#define TPF_ACCS_4 TPF_ACC_4(0)
#define TPF_ACCS_32 \
  TPF_ACC_4(0), TPF_ACC_4(4), TPF_ACC_4(8), TPF_ACC_4(12), TPF_ACC_4(16), TPF_ACC_4(20), TPF_ACC_4(24), TPF_ACC_4(28)
#define TPF_ACCS_36 \
  TPF_ACCS_32, TPF_ACC_4(32)
#define TPF_ACCS_44 \
  TPF_ACCS_36, TPF_ACC_4(36), TPF_ACC_4(40)
#define TPF_ACCS_48 \
  TPF_ACCS_44, TPF_ACC_4(44)
#define TPF_ACCS_64 \
  TPF_ACCS_48, TPF_ACC_4(48), TPF_ACC_4(52), TPF_ACC_4(56), TPF_ACC_4(60)
#define TPF_ACCS_68 \
  TPF_ACCS_64, TPF_ACC_4(64)
#define TPF_ACCS_72 \
  TPF_ACCS_68, TPF_ACC_4(68)
#define TPF_ACCS_88 \
  TPF_ACCS_72, TPF_ACC_4(72), TPF_ACC_4(76), TPF_ACC_4(80), TPF_ACC_4(84)
#define TPF_ACCS_96 \
  TPF_ACCS_88, TPF_ACC_4(88), TPF_ACC_4(92)
#define TPF_REGISTERS_4 "%0, %1, %2, %3"
#define TPF_REGISTERS_32 \
  TPF_REGISTERS_4 ", %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, " \
  "%30, %31"
#define TPF_REGISTERS_36 \
  TPF_REGISTERS_32 ", %32, %33, %34, %35"
#define TPF_REGISTERS_44 \
  TPF_REGISTERS_36 ", %36, %37, %38, %39, %40, %41, %42, %43"
#define TPF_REGISTERS_48 \
  TPF_REGISTERS_44 ", %44, %45, %46, %47"
#define TPF_REGISTERS_64 \
  TPF_REGISTERS_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TPF_REGISTERS_68 \
  TPF_REGISTERS_64 ", %64, %65, %66, %67"
#define TPF_REGISTERS_72 \
  TPF_REGISTERS_68 ", %68, %69, %70, %71"
#define TPF_REGISTERS_88 \
  TPF_REGISTERS_72 ", %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87"
#define TPF_REGISTERS_96 \
  TPF_REGISTERS_88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define TPF_MULTIPLY(in, columns, held, a_at, b_at, add_at, types, trailer)                              \
  __device__ inline void multiply(float (&acc)[held], uint64_t a, uint64_t b, bool add, in) {           \
    asm volatile(                                                                                             \
        "{\n.reg .pred p;\nsetp.ne.b32 p, " add_at ", 0;\n"                                                   \
        "wgmma.mma_async.sync.aligned.m64n" #columns types " {" TPF_REGISTERS_##held "}, " a_at ", " b_at \
        ", p, " trailer ";\n}\n"                                                                              \
        : TPF_ACCS_##held                                                                                \
        : "l"(a), "l"(b), "r"(static_cast<int>(add)));                                                        \
  }
#define TPF_MULTIPLY_16_BITS(columns, held, a_at, b_at, add_at)                                                 \
  TPF_MULTIPLY(__nv_bfloat16, columns, held, a_at, b_at, add_at, "k16.f32.bf16.bf16", "1, 1, 0, 0")             \
  TPF_MULTIPLY(__half, columns, held, a_at, b_at, add_at, "k16.f32.f16.f16", "1, 1, 0, 0")

TPF_MULTIPLY_16_BITS(8, 4, "%4", "%5", "%6")
TPF_MULTIPLY_16_BITS(72, 36, "%36", "%37", "%38")
TPF_MULTIPLY_16_BITS(96, 48, "%48", "%49", "%50")
TPF_MULTIPLY_16_BITS(128, 64, "%64", "%65", "%66")
TPF_MULTIPLY_16_BITS(136, 68, "%68", "%69", "%70")
TPF_MULTIPLY_16_BITS(144, 72, "%72", "%73", "%74")
TPF_MULTIPLY_16_BITS(176, 88, "%88", "%89", "%90")
TPF_MULTIPLY_16_BITS(192, 96, "%96", "%97", "%98")
TPF_MULTIPLY(__nv_fp8_e4m3, 64, 32, "%32", "%33", "%34", "k32.f32.e4m3.e4m3", "1, 1")
TPF_MULTIPLY(__nv_fp8_e4m3, 128, 64, "%64", "%65", "%66", "k32.f32.e4m3.e4m3", "1, 1")
TPF_MULTIPLY(__nv_fp8_e4m3, 136, 68, "%68", "%69", "%70", "k32.f32.e4m3.e4m3", "1, 1")
TPF_MULTIPLY(__nv_fp8_e4m3, 192, 96, "%96", "%97", "%98", "k32.f32.e4m3.e4m3", "1, 1")
// clang-format on

#undef TPF_MULTIPLY_16_BITS
#undef TPF_MULTIPLY
#undef TPF_REGISTERS_4
#undef TPF_REGISTERS_32
#undef TPF_REGISTERS_36
#undef TPF_REGISTERS_44
#undef TPF_REGISTERS_48
#undef TPF_REGISTERS_64
#undef TPF_REGISTERS_68
#undef TPF_REGISTERS_72
#undef TPF_REGISTERS_88
#undef TPF_REGISTERS_96
#undef TPF_ACCS_32
#undef TPF_ACCS_36
#undef TPF_ACCS_44
#undef TPF_ACCS_48
#undef TPF_ACCS_64
#undef TPF_ACCS_68
#undef TPF_ACCS_72
#undef TPF_ACCS_88
#undef TPF_ACCS_96
#undef TPF_ACCS_4
#undef TPF_ACC_4

// Of 8x8 matrices of 16 bits, lane t has columns t%4*2 and next of row t/4. Lane t gives the address of row t%8 of
// matrix t/8; where there are two matrices, the upper half of the lanes gives none.
__device__ inline void store_matrices(void* row, const uint32_t (&words)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}
__device__ inline void store_matrices(void* row, const uint32_t (&words)[2]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(shared_address(row)), "r"(words[0]),
               "r"(words[1])
               : "memory");
}

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
