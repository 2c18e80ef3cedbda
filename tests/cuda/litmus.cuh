// What the litmus tests of ordering.cu have in common.
#pragma once
#include "weakened.cuh"

namespace tpf {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kVectors = 8;  // of 16 bytes, that a thread has in a round, at most
constexpr int kWarpVectors = kVectors * 32, kWarpBytes = kWarpVectors * 16, kBlockBytes = kWarps * kWarpBytes;
constexpr uint32_t kRounds = 300;         // of a launch
constexpr int64_t kWaitNs = 500'000'000;  // of a wait, at most
constexpr int kSources = 7;               // rows that nobody writes, in global memory
constexpr int kSourceVectors = 4 * 32;
constexpr int kSourceBytes = kSourceVectors * 16;

struct Counters {
  uint32_t done;    // blocks that have ended
  uint32_t wrong;   // vectors, or fault records, that are not what their writer wrote
  uint32_t faults;  // blocks that waited in vain
};

struct Setup {
  ReduceArgs ranks[2];
  ProjectionArgs projection;  // rank 0's
  Counters* counters;
  char* sources;
  char* noise;
};

// Vector `index` of round `epoch`. No word is 0, 1 or ~0.
__device__ inline uint4 value(uint32_t epoch, uint32_t index) {
  const uint32_t first = (mix(epoch, index) & 0x3fffffffu) | 0x40000000u;
  return {first, first + 1, first + 2, first + 3};
}

__device__ inline bool differ(uint4 a, uint4 b) { return ((a.x ^ b.x) | (a.y ^ b.y) | (a.z ^ b.z) | (a.w ^ b.w)) != 0; }

// Where a thread's vectors are among its warp's. In global memory the lanes are side by side. In shared memory the
// lanes that are served at once are in the same banks: accesses take longest, and queue up.
__device__ inline int in_global(int v) { return v * 32 + static_cast<int>(threadIdx.x % 32); }
__device__ inline int in_shared(int v) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return (v / 2 * 8 + lane % 8) * 8 + v % 2 * 4 + lane / 8;
}

// The place of this warp's vectors in its pair's part of a slot.
__device__ inline int first_vector() { return static_cast<int>(threadIdx.x / 32) * kWarpVectors; }
__device__ inline char* rows_of(const tpf_team& team, int rank, uint32_t epoch) {
  return slot(team.region[rank], epoch, team.slot_bytes) + int64_t{blockIdx.x} * kBlockBytes + first_vector() * 16;
}

__device__ inline BlockRound round_of(const Setup& setup, uint32_t epoch) {
  return {epoch, setup.ranks[0].fingerprint, epoch, false};
}

// By all threads: reads what a peer is about to write, so that L1 has what was there before.
__device__ inline void read_stale(const char* rows, int vectors, uint32_t& wrong) {
  uint32_t read = 0;
  for (int v = 0; v < vectors; ++v) read |= load16_cached(rows + in_global(v) * 16).x;
  if (__syncthreads_or(read == 1)) ++wrong;  // it never is; the barrier waits for the loads
}

// By all threads, as in the product: one publishes what all have written, one waits for all.
__device__ inline void publish_rows(const Setup& setup, int rank, const BlockRound& round, int step) {
  __syncthreads();
  if (threadIdx.x == 0) publish_step(setup.ranks[rank].team, round, step, 1 - rank);
}

__device__ inline bool wait_for_rows(const Setup& setup, int rank, const BlockRound& round, int step) {
  const ReduceArgs& args = setup.ranks[rank];
  return __syncthreads_and(threadIdx.x != 0 || wait_step(args.team, args.call, round, step, blockIdx.x, 1 - rank));
}

// Where the product has no wait with a deadline: by these lanes of a warp, which give up together.
template <typename HasCome>
__device__ inline bool wait_until(uint32_t lanes, HasCome&& has_come) {
  const uint64_t start = now_ns();
  while (!has_come()) {
    if (__any_sync(lanes, now_ns() - start > kWaitNs)) return false;
  }
  return true;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// A warp's part of shared memory, which TMA loads and stores.
class RowBuffer {
 public:
  __device__ RowBuffer(char* buffers, uint64_t* barriers)
      : bytes(buffers + threadIdx.x / 32 * kWarpBytes), loaded_(barriers + threadIdx.x / 32) {
    if (threadIdx.x % 32 == 0) {
      barrier_init(loaded_, 1);
      fence_async_shared();
    }
    __syncwarp();
  }

  __device__ void load(const char* from, int vectors) {
    if (elect()) {
      barrier_expect(loaded_, vectors * 512);
      bulk_load(shared_address(bytes), from, vectors * 512, shared_address(loaded_));
    }
    __syncwarp();
    barrier_wait(loaded_, parity_);
    parity_ ^= 1;
  }

  template <typename Expected>
  __device__ void write(int vectors, const Expected& expected) {
    for (int v = 0; v < vectors; ++v) store16(bytes + in_shared(v) * 16, expected(in_shared(v)));
  }

  // How many of this thread's vectors are not as expected. Its vote keeps the warp until all have been read.
  template <typename Expected>
  __device__ uint32_t count_wrong(int vectors, const Expected& expected) const {
    uint32_t wrong = 0;
    for (int v = 0; v < vectors; ++v) {
      wrong += differ(*reinterpret_cast<const uint4*>(bytes + in_shared(v) * 16), expected(in_shared(v)));
    }
    return __any_sync(0xffffffffu, wrong > 0) ? wrong : 0;
  }

  char* const bytes;

 private:
  uint64_t* const loaded_;
  uint32_t parity_ = 0;
};

#endif

}  // namespace tpf
