// The bulk copy engine of sm_90 and newer, and the mbarriers it completes on. PTX ISA, "cp.async.bulk", "mbarrier".
#pragma once
#include "../plan/card.h"

namespace tpf {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The copy engine takes its operands from registers that a warp has in common. The compiler has to know that they are
// the same in all threads, and that one thread asks: or it makes a loop over the threads out of each copy, which takes
// longer than what a product waits for.

// What is the same in all threads of a warp, for the compiler to know it.
__device__ inline uint32_t uniform(uint32_t value) { return __shfl_sync(0xffffffffu, value, 0); }

// Whether this is the one thread of a warp, the same each time, that asks. PTX ISA, "elect.sync".
__device__ inline bool elect() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred one;\n"
      "elect.sync _|one, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, one;\n"
      "}\n"
      : "=r"(elected));
  return elected != 0;
}

__device__ inline void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes initialised mbarriers, and shared memory written by ordinary stores, known to the copy engine.
__device__ inline void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Orders global memory between ordinary accesses and those of the copy engine, both ways.
__device__ inline void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

__device__ inline void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// The same, with an operand that is always 0, which the compiler does not know: the arrival waits for it to be loaded.
__device__ inline void barrier_arrive_having(uint64_t* barrier, uint32_t zero) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier) + zero) : "memory");
}

__device__ inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ inline void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  barrier_expect(shared_address(barrier), bytes);
}

// Within one block and for copies that are on their way: needs no deadline.
__device__ inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
__device__ inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  barrier_wait(shared_address(barrier), parity);
}

// How long the L2 cache is to keep what is copied: as usual, or not, where it is not read again soon and shall not
// drive out what is. PTX ISA, "createpolicy".
__device__ inline uint64_t normal_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ inline uint64_t streaming_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ inline void bulk_load(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
               "l"(global), "r"(bytes), "r"(barrier)
               : "memory");
}
__device__ inline void bulk_load(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier,
                                 uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(shared),
      "l"(global), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

__device__ inline void bulk_store(void* global, uint32_t shared, uint32_t bytes, uint64_t policy) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%0], [%1], %2, %3;" ::"l"(global),
               "r"(shared), "r"(bytes), "l"(policy)
               : "memory");
}

// Asks for memory to be brought to the L2 cache of the card that it belongs to.
__device__ inline void bulk_prefetch(const void* global, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
}

// 4 or 16 bytes, asynchronously; the barrier counts an arrival of this thread when all it has begun so far are there.
// PTX ISA, "cp.async.mbarrier.arrive".
template <int kBytes>
__device__ inline void copy_async(void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(shared)), "l"(global), "n"(kBytes)
               : "memory");
}
__device__ inline void arrive_when_copied(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Ends a group of this thread's stores, which bulk_wait_read counts.
__device__ inline void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until at most kPending groups of this thread's stores still read shared memory.
template <int kPending>
__device__ inline void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Until all of this thread's stores are in global memory.
__device__ inline void bulk_wait_all() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// A position in a ring of shared-memory stages, and how often the ring has been gone round before it.
struct RingPosition {
  __device__ void advance(int items, int stages) {
    for (stage += items; stage >= stages; stage -= stages) ++round;
  }
  int stage = 0;
  uint32_t round = 0;
};

// Moves items through shared memory with the copy engine alone: kBuffers buffers, loads kAhead items ahead of the
// stores. A warp drives it. `put(item, buffer)` stores an item with bulk_store; one thread calls it.
template <typename Item, typename Put, int kAhead, int kBuffers = kCopierStages>
class BulkMover {
 public:
  __device__ BulkMover(char* buffers, uint64_t* barriers, uint32_t buffer_bytes, Put put)
      : buffers_(uniform(shared_address(buffers))),
        barriers_(uniform(shared_address(barriers))),
        buffer_bytes_(buffer_bytes),
        put_(put) {}

  __device__ void move(const Item& item, const char* from, uint32_t bytes) {
    const int stage = loaded_ % kBuffers;
    if (elect()) {
      bulk_wait_read<kBuffers - kAhead - 1>();
      barrier_expect(barrier(stage), bytes);
      bulk_load(buffer(stage), from, bytes, barrier(stage));
    }
    __syncwarp();
    // The items in flight are remembered in registers, newest first.
    if (loaded_ - stored_ == kAhead) store(items_[kAhead - 1]);
#pragma unroll
    for (int i = kAhead - 1; i > 0; --i) items_[i] = items_[i - 1];
    items_[0] = item;
    ++loaded_;
  }

  // All items are in global memory when this returns.
  __device__ void flush() {
#pragma unroll
    for (int i = kAhead - 1; i >= 0; --i) {
      if (loaded_ - stored_ == i + 1) store(items_[i]);
    }
    if (elect()) bulk_wait_all();
    __syncwarp();
  }

 private:
  __device__ void store(const Item& item) {
    const int stage = stored_ % kBuffers;
    barrier_wait(barrier(stage), stored_ / kBuffers & 1);
    if (elect()) {
      put_(item, buffer(stage));
      bulk_commit();
    }
    __syncwarp();
    ++stored_;
  }

  __device__ uint32_t buffer(int stage) const { return buffers_ + stage * buffer_bytes_; }
  __device__ uint32_t barrier(int stage) const { return barriers_ + stage * sizeof(uint64_t); }

  const uint32_t buffers_, barriers_;  // in shared memory
  const uint32_t buffer_bytes_;
  Put put_;
  uint32_t loaded_ = 0, stored_ = 0;
  Item items_[kAhead] = {};
};

struct Run {
  char* to;
  uint32_t bytes;
  uint64_t policy;
};

struct PutRun {
  __device__ void operator()(const Run& run, uint32_t buffer) const {
    bulk_store(run.to, buffer, run.bytes, run.policy);
  }
};

// Copies runs of bytes.
class BulkCopier : public BulkMover<Run, PutRun, 2> {
 public:
  __device__ BulkCopier(char* buffers, uint64_t* barriers, uint32_t buffer_bytes)
      : BulkMover(buffers, barriers, buffer_bytes, PutRun{}) {}
  __device__ void copy(char* to, const char* from, uint32_t bytes, uint64_t policy) {
    move({to, bytes, policy}, from, bytes);
  }
};

#endif

}  // namespace tpf
