// One block's part in a round of the protocol (csrc/protocol.h), on the GPU. Block b of every rank meets block b of all
// others: the grids are equal, so no block waits for one that does not exist.
#pragma once
#include <cstddef>

#include "../../protocol.h"
#include "../ptx/vec.cuh"

namespace tpf {

constexpr int kClosingStep = TPF_MAX_STEPS - 1;

__device__ inline uint64_t now_ns() {
  uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

// Programmatic dependent launch (PDL), from sm_90 on: a kernel may be brought to its SMs while the one before it on the
// stream still runs. It then waits here for what that one has done, before it reads anything.
__device__ inline void pdl_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ inline void pdl_trigger() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// What a block knows of the call it is in. All threads hold the same.
struct BlockRound {
  uint32_t epoch;
  uint32_t fingerprint;
  uint32_t call_number;
  bool refused;  // this call, or one before it, has faulted: nothing is to be done
};

__device__ inline bool has_faulted(const tpf_team& team) {
  return shared_ref<uint32_t>(control(team.region[team.rank])->faulted).load(order::memory_order_relaxed) != 0;
}

__device__ inline void report(const tpf_team& team, const tpf_call& call, const BlockRound& round, tpf_status status,
                              int peer, int step, uint64_t seen, uint64_t waited_ns) {
  Control* own = control(team.region[team.rank]);
  // The first one writes the record. Of a workspace that is closed every replayed graph does, whatever came before.
  if (atomicExch(&own->claimed, 1u) != 0 && status != TPF_CLOSED) return;
  const tpf_call* const announced = &control(team.region[peer])->announced[round.epoch & 1];
  if (status == TPF_DISAGREE) {
    // A word that was not released may have come before what its sender announced: a matter of microseconds.
    constexpr uint64_t kBackoffNs = 1000000;
    const uint64_t start = now_ns();
    while (fingerprint_of(*announced) != static_cast<uint32_t>(seen) && now_ns() - start < kBackoffNs) {
      __threadfence_system();
    }
  }
  tpf_fault* const records[2] = {&own->fault, team.mailbox};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    tpf_fault* record = records[i];
    record->rank = team.rank;
    record->peer = status == TPF_PEER_FAULTED ? static_cast<int>(own->notified) - 1 : peer;  // or who is waited for
    record->step = step;
    record->epoch = round.epoch;
    record->seen_epoch = epoch_of(seen);
    record->call_number = round.call_number;
    record->waited_ns = waited_ns;
    record->expected = call;
    if (status == TPF_DISAGREE) record->seen = *announced;
    __threadfence_system();
    record->status = status;
  }
  shared_ref<uint32_t>(own->faulted).store(1, order::memory_order_release);
  if (status == TPF_CLOSED) return;  // the peers' memory may be gone
#pragma unroll 1
  for (int other = 0; other < team.world_size; ++other) {
    if (other == team.rank) continue;
    shared_ref<uint32_t>(control(team.region[other])->notified).store(1 + team.rank, order::memory_order_release);
  }
}

// Whether the call may begin, after calls of which `now` tells: nobody has given up or closed, and these have ended.
__device__ inline bool may_begin(const Control* own, const Progress& now) {
  static_assert(offsetof(Control, faulted) == 0 && offsetof(Control, notified) == 4 && offsetof(Control, closed) == 8 &&
                offsetof(Control, ended) == 12);
  const uint2* const head = reinterpret_cast<const uint2*>(own);
  const uint2 faults = head[0], rest = head[1];
  return (faults.x | faults.y | rest.x) == 0 && now.begun == now.calls &&
         static_cast<int32_t>(rest.y - now.blocks) >= 0;
}

// By some threads of every block, once in many rounds: see kOldest. Nobody waits for it.
__device__ inline void refresh_signals(const tpf_team& team, uint32_t epoch, int thread, int threads) {
  if (!refreshes(epoch - 1, 2)) [[likely]]
    return;  // an op has two rounds at most
  void* const own = team.region[team.rank];
#pragma unroll 1
  for (int block = blockIdx.x; block < TPF_MAX_CTAS; block += gridDim.x) {
#pragma unroll 1
    for (int word = thread; word < TPF_MAX_STEPS * TPF_MAX_RANKS; word += threads) {
      refresh(signal(own, word / TPF_MAX_RANKS, block, word % TPF_MAX_RANKS), epoch);
    }
  }
}

// Opens the op: reads this block's progress, announces the call, and advances all blocks' progress by `rounds` for the
// next call. All threads of the block call it. A kernel that has no registers to spare here refreshes signals
// elsewhere.
template <bool kRefreshes = true>
__device__ inline BlockRound begin_op(const tpf_team& team, const tpf_call& call, uint32_t fingerprint, int rounds) {
  Control* own = control(team.region[team.rank]);
  const Progress now = own->progress[blockIdx.x];
  const bool admitted = may_begin(own, now);
  // Every block announces the same; the barrier below orders it before any thread's signal.
  if (threadIdx.x == 0) {
    if (admitted) own->announced[(now.epoch + 1) & 1] = call;  // a refused call is not announced
    own->claims[now.calls & 1] = 0;                            // the next call's
  }
  // All threads have read the entry that one of them is about to write; and they agree, should a fault come up
  // meanwhile.
  const bool refused = __syncthreads_or(!admitted);
  const Progress next = {now.epoch + rounds, now.blocks + gridDim.x, now.calls + 1, now.calls + 1};
  if (kRefreshes) refresh_signals(team, now.epoch + 1, threadIdx.x, blockDim.x);
  const int step = blockDim.x * gridDim.x;
#pragma unroll 1
  for (int block = blockIdx.x + (threadIdx.x + 1) * gridDim.x; block < TPF_MAX_CTAS; block += step) {
    own->progress[block] = next;
  }
  if (threadIdx.x == 0) {
    // `begun` is added to: two calls that began at the very same time leave more in it than in `calls`.
    Progress& entry = own->progress[blockIdx.x];
    entry.epoch = next.epoch, entry.blocks = next.blocks, entry.calls = next.calls;
    atomicAdd(&entry.begun, 1u);
  }
  return {now.epoch + 1, fingerprint, now.calls + 1, refused};
}

// By one thread of a block that was refused: why.
__device__ inline void report_refusal(const tpf_team& team, const tpf_call& call, const BlockRound& round) {
  const Control* own = control(team.region[team.rank]);
  const tpf_status status = own->closed != 0 ? TPF_CLOSED : own->notified != 0 ? TPF_PEER_FAULTED : TPF_OVERLAP;
  report(team, call, round, status, team.rank, 0, 0, 0);
}

// Closes the op, by all threads of the block or, where others have left it, of the last warp: when all have done their
// work. What follows a fault stands apart, for the usual way to be a short one.
__device__ inline void end_op(const tpf_team& team) {
  if (threadIdx.x == 0) atomicAdd(&control(team.region[team.rank])->ended, 1u);
}

__device__ inline void end_faulted_op(const tpf_team& team, const tpf_call& call, const BlockRound& round) {
  if (round.refused && threadIdx.x == 0) report_refusal(team, call, round);
  end_op(team);
}

__device__ inline void publish_step(const tpf_team& team, const BlockRound& round, int step, int cta, int peer) {
  publish(signal(team.region[peer], step, cta, team.rank), round.epoch, round.fingerprint);
}

__device__ inline void publish_step(const tpf_team& team, const BlockRound& round, int step, int peer) {
  publish_step(team, round, step, blockIdx.x, peer);
}

// Says nothing of what this kernel has written, so there is no fence to wait for: that this block is in the round, or
// that it has read. What earlier kernels wrote was seen by all when they ended, and a read has ended when its value is
// there.
__device__ inline void signal_unfenced(const tpf_team& team, const BlockRound& round, int step, int peer) {
  shared_ref<uint64_t>(*signal(team.region[peer], step, blockIdx.x, team.rank))
      .store(signal_word(round.epoch, round.fingerprint), order::memory_order_relaxed);
}

// How long a wait goes on. It is asked between two looks, of which the last comes after the verdict: a peer that is
// gone may have written just before.
class Backoff {
 public:
  // `missing()` is the peer that is waited for.
  template <typename Missing>
  __device__ tpf_status ask(const tpf_team& team, Missing&& missing) {
    if (++looks_ % 1024 != 0) return TPF_OK;
    if (verdict_ != TPF_OK) return verdict_;
    // One deadline a call: where another wait has failed, its record stands.
    if (has_faulted(team)) {
      verdict_ = TPF_PEER_FAULTED;
      return TPF_OK;
    }
    const uint64_t now = now_ns();
    if (start_ == 0) start_ = now;
    Control *own = control(team.region[team.rank]), *other = control(team.region[missing()]);
    if (now - start_ > static_cast<uint64_t>(team.timeout_ns)) {
      verdict_ = TPF_NEVER_ARRIVED;
    } else if (shared_ref<uint32_t>(own->notified).load(order::memory_order_acquire) != 0) {
      verdict_ = TPF_PEER_FAULTED;
    } else if (shared_ref<uint32_t>(other->closed).load(order::memory_order_acquire) != 0) {
      verdict_ = TPF_PEER_CLOSED;
    }
    return TPF_OK;
  }
  __device__ uint64_t waited_ns() const { return start_ == 0 ? 0 : now_ns() - start_; }

 private:
  uint64_t start_ = 0;
  uint32_t looks_ = 0;
  tpf_status verdict_ = TPF_OK;
};

// Whether a peer has said that it gave up. The call then fails; the notification is record enough.
__device__ inline bool was_notified(const tpf_team& team) {
  return shared_ref<uint32_t>(control(team.region[team.rank])->notified).load(order::memory_order_acquire) != 0;
}

// Waits for one peer's word; false, with the fault on record, where that fails.
__device__ inline bool wait_step(const tpf_team& team, const tpf_call& call, const BlockRound& round, int step, int cta,
                                 int peer) {
  uint64_t* word = signal(team.region[team.rank], step, cta, peer);
  uint64_t seen;
  Backoff backoff;
  const tpf_status status =
      wait_for(word, round.epoch, round.fingerprint, &seen, [&] { return backoff.ask(team, [&] { return peer; }); });
  if (status == TPF_OK) return true;
  report(team, call, round, status, peer, step, seen, backoff.waited_ns());
  return false;
}

}  // namespace tpf
