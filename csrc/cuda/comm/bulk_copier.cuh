// Copies between global memories by TMA alone, through shared memory.
#pragma once
#include "../ptx/bulk.cuh"

namespace tpf {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// A position in a ring of shared-memory stages, and how often the ring has been gone round before it.
struct RingPosition {
  __device__ void advance(int items, int stages) {
    for (stage += items; stage >= stages; stage -= stages) ++round;
  }
  int stage = 0;
  uint32_t round = 0;
};

// Moves items through shared memory by TMA alone: kBuffers buffers, loads kAhead items ahead of the
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
