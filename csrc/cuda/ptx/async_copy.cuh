// Copies of 16 bytes from global to shared memory that a thread does not wait for, from sm_80 on. PTX ISA, "cp.async".
#pragma once
#include <cstdint>

namespace tpf {

// 0 where it is outside; `from` is then not read.
__device__ inline void copy16_async(void* shared, const void* from, bool inside) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all but the last kPending groups that this thread has committed are there, for this thread to read.
template <int kPending>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ inline void prefetch_to_l2(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

}  // namespace tpf
