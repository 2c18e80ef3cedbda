// The product's headers, as they are or with an order taken out: -DTPF_WEAKEN=PUBLISH_RELEASE. An order of C++ loses
// its strength around the header that asks for it; a function becomes nothing, or what it is stronger than. Several at
// once: -DTPF_WEAKEN=COUNT_ACQUIRE|BULK_WAIT_READ.
#pragma once
// Whatever these headers include comes first, for it to stay as it is.
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cfloat>
#include <numeric>
#include <type_traits>

#include "cuda/ptx/atomic.cuh"

// protocol.h: rows before their signal, and the signal before the rows.
#define PUBLISH_RELEASE 1
#define OBSERVE_ACQUIRE 2
// vec.cuh: words that a peer posts are not read out of L1.
#define RELAXED_LOAD 4
// signal.cuh: a fault record before its status, and before `faulted` and `notified`; `notified` and `closed`.
#define REPORT_FENCE 8
#define REPORT_RELEASE 16
#define NOTIFIED_ACQUIRE 32
// qkv_a_proj_ag_finish.cuh: a tile and those counted before it before the count, and the count before the tiles.
#define COUNT_ACQ_REL 64
#define COUNT_ACQUIRE 128
// bulk.cuh: TMA sees what threads wrote, and the other way round.
#define FENCE_ASYNC_SHARED 256
#define FENCE_ASYNC_GLOBAL 512
// bulk.cuh: a row buffer has been stored before it is written again; stored rows are there before they are published;
// a row buffer has been read before it is given back.
#define BULK_WAIT_READ 1024
#define BULK_WAIT_ALL 2048
#define ARRIVE_HAVING 4096
// rs_rmsnorm_one_row.cuh: inputs have been read before their owner has them back.
#define SYNC_HAVING 8192

#if (TPF_WEAKEN) & PUBLISH_RELEASE
#define memory_order_release memory_order_relaxed
#endif
#if (TPF_WEAKEN) & OBSERVE_ACQUIRE
#define memory_order_acquire memory_order_relaxed
#endif
#include "protocol.h"
#undef memory_order_release
#undef memory_order_acquire

#if (TPF_WEAKEN) & RELAXED_LOAD
#define load16_relaxed load16_relaxed_unweakened
#endif
#include "cuda/ptx/vec.cuh"
#undef load16_relaxed

namespace tpf {

// An ordinary load: L1 keeps the line.
__device__ inline uint4 load16_cached(const void* address) {
  uint4 raw;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(raw.x), "=r"(raw.y), "=r"(raw.z), "=r"(raw.w)
               : "l"(address)
               : "memory");
  return raw;
}
#if (TPF_WEAKEN) & RELAXED_LOAD
__device__ inline uint4 load16_relaxed(const void* address) { return load16_cached(address); }
#endif

template <int kPending>
__device__ inline void no_wait() {}

}  // namespace tpf

#if (TPF_WEAKEN) & REPORT_FENCE
#define __threadfence_system()
#endif
#if (TPF_WEAKEN) & REPORT_RELEASE
#define memory_order_release memory_order_relaxed
#endif
#if (TPF_WEAKEN) & NOTIFIED_ACQUIRE
#define memory_order_acquire memory_order_relaxed
#endif
#include "cuda/comm/signal.cuh"
#undef __threadfence_system
#undef memory_order_release
#undef memory_order_acquire

#if (TPF_WEAKEN) & COUNT_ACQ_REL
#define memory_order_acq_rel memory_order_relaxed
#endif
#if (TPF_WEAKEN) & COUNT_ACQUIRE
#define memory_order_acquire memory_order_relaxed
#endif
#include "cuda/kernels/qkv_a_proj_ag_finish.cuh"
#undef memory_order_acq_rel
#undef memory_order_acquire

#include "cuda/kernels/rs_rmsnorm_one_row.cuh"

// Of these the litmus tests call what the product's kernels call.
#if (TPF_WEAKEN) & FENCE_ASYNC_SHARED
#define fence_async_shared()
#endif
#if (TPF_WEAKEN) & FENCE_ASYNC_GLOBAL
#define fence_async_global()
#endif
#if (TPF_WEAKEN) & BULK_WAIT_READ
#define bulk_wait_read no_wait
#endif
#if (TPF_WEAKEN) & BULK_WAIT_ALL
#define bulk_wait_all no_wait<0>
#endif
#if (TPF_WEAKEN) & ARRIVE_HAVING
#define barrier_arrive_having(barrier, zero) barrier_arrive(barrier)
#endif
#if (TPF_WEAKEN) & SYNC_HAVING
#define sync_having(value) (__syncthreads(), true)
#endif
