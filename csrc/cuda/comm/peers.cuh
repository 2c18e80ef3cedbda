// A rank's peers: the addresses of their rows, signals to them and waits for them, copies by threads; and poison, where
// one of them failed.
#pragma once
#include "signal.cuh"

namespace tpf {

// ---- where ----

__device__ inline char* slot_of(const tpf_team& team, int rank, uint32_t epoch) {
  return slot(team.region[rank], epoch, team.slot_bytes);
}

__device__ inline char* inbox_of(const tpf_team& team, int rank, uint32_t epoch) {
  return inbox(team.region[rank], epoch, team.slot_bytes);
}

// The input of `rank`, where inputs are read in place.
__device__ inline const char* input_of(const tpf_symm& symm, int rank) {
  return static_cast<const char*>(symm.base[rank]) + symm.offset;
}

// run(peer) for all of them. Each rank begins with its successor, so that they read from different ranks at a time.
template <typename Run>
__device__ inline void for_peers(const tpf_team& team, Run&& run) {
#pragma unroll 1
  for (int offset = 1; offset < team.world_size; ++offset) run((team.rank + offset) % team.world_size);
}

// ---- signals: lanes 0..world_size-1 of a warp, or threads of a block, each take one peer ----

__device__ inline bool is_peer(const tpf_team& team, int lane) { return lane < team.world_size && lane != team.rank; }

__device__ inline void publish_to_peers(const tpf_team& team, const BlockRound& round, int step, int lane) {
  if (is_peer(team, lane)) publish_step(team, round, step, lane);
}

// Without a fence: see signal_unfenced.
__device__ inline void signal_unfenced_to_peers(const tpf_team& team, const BlockRound& round, int step, int lane) {
  if (is_peer(team, lane)) signal_unfenced(team, round, step, lane);
}

// Of each lane: whether its peer has come, if it has one.
__device__ inline bool wait_for_peers(const tpf_team& team, const tpf_call& call, const BlockRound& round, int step,
                                      int lane) {
  return !is_peer(team, lane) || wait_step(team, call, round, step, blockIdx.x, lane);
}

// ---- rows ----

// By one thread: to(peer) <- from(peer), a vector of 16 bytes of each peer that has(peer). Four are loaded before the
// first is stored: there are no registers for all.
template <typename Has, typename To, typename From>
__device__ inline void copy_vectors_of_peers(Has&& has, To&& to, From&& from) {
#pragma unroll 1
  for (int first = 0; first < TPF_MAX_RANKS; first += 4) {
    uint4 raw[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (has(first + i)) raw[i] = load16(from(first + i));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (has(first + i)) store16(to(first + i), raw[i]);
    }
  }
}

// Leaves no number that could be taken for a result: bytes of 0xff are NaN in every dtype that has one.
__device__ inline void poison(void* to, int64_t bytes, int thread, int threads) {
#pragma unroll 1
  for (int64_t at = thread; at < bytes; at += threads) static_cast<char*>(to)[at] = ~0;
}

}  // namespace tpf
