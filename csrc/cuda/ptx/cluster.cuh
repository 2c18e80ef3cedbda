// Clusters of blocks, from sm_90 on, and each other's shared memory. PTX ISA, "mapa", "barrier.cluster".
#pragma once
#include "bulk.cuh"

namespace tpf {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// Where `shared` lies in block `cta` of the cluster.
__device__ inline uint32_t cluster_address(const void* shared, int cta) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(shared)), "r"(cta));
  return address;
}

__device__ inline float4 cluster_load(const float* shared, int cta) {
  float4 values;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(values.x), "=f"(values.y), "=f"(values.z), "=f"(values.w)
               : "r"(cluster_address(shared, cta))
               : "memory");
  return values;
}

// By all threads of all blocks: what was written before cluster_arrive is seen by all after cluster_wait.
__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
// Without a fence: of writes nothing is said.
__device__ inline void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }

#else  // a cluster is one block

__device__ inline float4 cluster_load(const float* shared, int) { return *reinterpret_cast<const float4*>(shared); }
__device__ inline void cluster_arrive() { __syncthreads(); }
__device__ inline void cluster_arrive_relaxed() {}
__device__ inline void cluster_wait() {}

#endif

}  // namespace tpf
