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

__device__ inline void cluster_store(uint32_t* shared, int cta, uint32_t value) {
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(cluster_address(shared, cta)), "r"(value) : "memory");
}

// Writes to where `to` lies in block `cta`, and completes 4 bytes on its mbarrier. Unlike a barrier of the cluster,
// which is a fence too, this does not wait for what was stored before. PTX ISA, "st.async".
__device__ inline void cluster_store_async(float* to, uint64_t* barrier, int cta, float value) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(cluster_address(to, cta)),
      "f"(value), "r"(cluster_address(barrier, cta))
      : "memory");
}

// Until what other blocks store asynchronously is here: blocks of a cluster run together, so this needs no deadline.
__device__ inline void cluster_wait_stores(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Makes this thread's barrier_init seen by all blocks that pass a barrier of the cluster after it.
__device__ inline void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

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
