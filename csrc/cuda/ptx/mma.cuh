// Warp-wide tensor-core products of 16 rows by 8 columns, from sm_80 on; of fp8 from sm_89 on. PTX ISA, "mma.sync".
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

namespace tpf {

// accumulators += a b: 32 bytes of K. Lane l has the rows l / 4 and 8 + l / 4 of a, the column l / 4 of b, and of the
// accumulators these rows at columns 2 (l % 4) and the next one: two of the one row, then two of the other.
#define TPF_MMA(shape, type)                                                                                \
  asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type                                      \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "                                                  \
               "{%8, %9}, {%0, %1, %2, %3};"                                                                \
               : "+f"(accumulators[0]), "+f"(accumulators[1]), "+f"(accumulators[2]), "+f"(accumulators[3]) \
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))

__device__ inline void mma(float (&accumulators)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                           uint32_t b1, __nv_bfloat16) {
  TPF_MMA("m16n8k16", "bf16");
}

__device__ inline void mma(float (&accumulators)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                           uint32_t b1, __half) {
  TPF_MMA("m16n8k16", "f16");
}

__device__ inline void mma(float (&accumulators)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                           uint32_t b1, __nv_fp8_e4m3) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  TPF_MMA("m16n8k32", "e4m3");
#endif
}

#undef TPF_MMA

}  // namespace tpf
