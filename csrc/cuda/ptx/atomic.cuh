// Words that others write meanwhile: std::atomic_ref's accesses, by functions that are built into nvcc (from 12.8 on).
// cuda::atomic_ref comes to the same instructions, but <cuda/atomic> takes longer to compile than all else that these
// files include, in every file and for every architecture.
#pragma once
#include <type_traits>

namespace tpf {

// Whose accesses are ordered: those of all GPUs and the host, of the GPU, of the block.
constexpr int kSystemScope = __NV_THREAD_SCOPE_SYSTEM;
constexpr int kDeviceScope = __NV_THREAD_SCOPE_DEVICE;
constexpr int kBlockScope = __NV_THREAD_SCOPE_BLOCK;

// Types, for nvcc to have an order that is known when it compiles.
namespace order {
template <int kOrder>
using Order = std::integral_constant<int, kOrder>;
inline constexpr Order<__NV_ATOMIC_RELAXED> memory_order_relaxed;
inline constexpr Order<__NV_ATOMIC_ACQUIRE> memory_order_acquire;
inline constexpr Order<__NV_ATOMIC_RELEASE> memory_order_release;
inline constexpr Order<__NV_ATOMIC_ACQ_REL> memory_order_acq_rel;
}  // namespace order

template <typename T, int kScope>
class AtomicRef {
 public:
  __device__ explicit AtomicRef(T& word) : word_(&word) {}

  template <int kOrder>
  __device__ T load(order::Order<kOrder>) const {
    return __nv_atomic_load_n(word_, kOrder, kScope);
  }
  template <int kOrder>
  __device__ void store(T value, order::Order<kOrder>) const {
    __nv_atomic_store_n(word_, value, kOrder, kScope);
  }
  template <int kOrder>
  __device__ T fetch_add(T value, order::Order<kOrder>) const {
    return __nv_atomic_fetch_add(word_, value, kOrder, kScope);
  }
  template <int kOrder>
  __device__ bool compare_exchange_strong(T& expected, T desired, order::Order<kOrder>) const {
    return __nv_atomic_compare_exchange_n(word_, &expected, desired, /*weak=*/false, kOrder, kOrder, kScope);
  }

 private:
  T* word_;
};

}  // namespace tpf
