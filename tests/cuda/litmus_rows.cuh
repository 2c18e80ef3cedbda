// Litmus tests of rows: passed to a peer, moved by TMA, read in place.
#pragma once
#include "litmus.cuh"

namespace tpf {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// kCached: ordinary loads. kThread: as the product's threads do. kBulk: TMA.
enum class By { kCached, kThread, kBulk };

// Two ranks write into each other's slots in turn. That a rank publishes says, too, that it has read.
template <By kWritten, By kRead>
__device__ inline bool pass_rows(const Setup& setup, uint32_t& wrong) {
  extern __shared__ __align__(128) char buffers[];
  __shared__ uint64_t barriers[kWarps];
  const int rank = blockIdx.y, peer = 1 - rank;
  const tpf_team& team = setup.ranks[rank].team;
  RowBuffer buffer(buffers, barriers);
  for (uint32_t epoch = 1; epoch <= kRounds; ++epoch) {
    const BlockRound round = round_of(setup, epoch);
    const bool writes = (epoch & 1) == rank;
    const int vectors = 2 + epoch / 2 % (kVectors / 2) * 2;  // of a thread: few take less time, many more
    char* const rows = rows_of(team, writes ? peer : rank, epoch);
    const auto expected = [&](int place) { return value(epoch, first_vector() + place); };
    if (writes && kWritten == By::kBulk) {
      buffer.write(vectors, expected);
      fence_async_shared();
      __syncwarp();
      if (elect()) {
        bulk_store(rows, shared_address(buffer.bytes), vectors * 512, normal_policy());
        bulk_commit();
        bulk_wait_read<0>();
      }
      __syncwarp();
      buffer.write(vectors, [](int) { return uint4{}; });
      fence_async_shared();
      if (elect()) bulk_wait_all();
      fence_async_global();
    } else if (writes) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (v < vectors) store16(rows + in_global(v) * 16, expected(in_global(v)));
      }
    }
    if (writes) {
      publish_rows(setup, rank, round, 0);
      continue;
    }
    if (kRead != By::kBulk) read_stale(rows, vectors, wrong);
    if (!wait_for_rows(setup, rank, round, 0)) return false;
    if constexpr (kRead == By::kBulk) {
      fence_async_global();
      buffer.load(rows, vectors);
      wrong += buffer.count_wrong(vectors, expected);
    } else {
#pragma unroll
      for (int v = kVectors - 1; v >= 0; --v) {  // what was written last comes first
        if (v >= vectors) continue;
        const char* const from = rows + in_global(v) * 16;
        wrong += differ(kRead == By::kCached ? load16_cached(from) : load16(from), expected(in_global(v)));
      }
    }
  }
  return true;
}

// A warp writes rows, and has TMA bring them back. Nobody else is concerned.
__device__ inline bool load_own_rows(const Setup& setup, uint32_t& wrong) {
  extern __shared__ __align__(128) char buffers[];
  __shared__ uint64_t barriers[kWarps];
  char* const rows = rows_of(setup.ranks[0].team, blockIdx.y, 0);
  RowBuffer buffer(buffers, barriers);
  for (uint32_t epoch = 1; epoch <= kRounds; ++epoch) {
    const auto expected = [&](int place) { return value(epoch, place); };
#pragma unroll
    for (int v = 0; v < kVectors; ++v) store16(rows + in_global(v) * 16, expected(in_global(v)));
    fence_async_global();
    __syncwarp();
    buffer.load(rows, kVectors);
    wrong += buffer.count_wrong(kVectors, expected);
  }
  return true;
}

// Each warp loads rows into a ring of buffers, of which it gives one back to itself and loads it again at once.
__device__ inline bool reuse_buffers(const Setup& setup, uint32_t& wrong) {
  constexpr int kStages = 3, kStageVectors = kSourceVectors / 32, kRows = 8 * kRounds;
  extern __shared__ __align__(128) char buffers[];
  __shared__ uint64_t barriers[2 * kWarps * kStages];
  const int first = threadIdx.x / 32 * kStages;
  uint64_t *const full = barriers + 2 * first, *const empty = full + kStages;
  if (threadIdx.x % 32 == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(full + stage, 1);
      barrier_init(empty + stage, 32);
    }
    fence_async_shared();
  }
  __syncwarp();
  const auto buffer = [&](int stage) { return buffers + (first + stage) * kSourceBytes; };
  const auto load = [&](int stage, int row) {
    if (elect()) {
      barrier_expect(full + stage, kSourceBytes);
      bulk_load(shared_address(buffer(stage)), setup.sources + row % kSources * kSourceBytes, kSourceBytes,
                shared_address(full + stage));
    }
    __syncwarp();
  };
  for (int stage = 0; stage < kStages; ++stage) load(stage, stage);
  RingPosition at;
  for (int row = 0; row < kRows; ++row, at.advance(1, kStages)) {
    barrier_wait(full + at.stage, at.round & 1);
    uint4 raw[kStageVectors];
    uint32_t read = 0;
#pragma unroll
    for (int v = 0; v < kStageVectors; ++v) {
      raw[v] = *reinterpret_cast<const uint4*>(buffer(at.stage) + in_shared(v) * 16);
      read |= raw[v].x;
    }
    barrier_arrive_having(empty + at.stage, read & setup.ranks[0].no_bits);
    if (row + kStages < kRows) {
      barrier_wait(empty + at.stage, at.round & 1);
      load(at.stage, row + kStages);
    }
#pragma unroll
    for (int v = 0; v < kStageVectors; ++v) wrong += differ(raw[v], value(row % kSources, in_shared(v)));
  }
  return true;
}

// Rank 1 reads rank 0's input in place. Rank 0 writes the next one as soon as it hears that this one has been read.
__device__ inline bool read_in_place(const Setup& setup, uint32_t& wrong) {
  const int rank = blockIdx.y;
  const tpf_team& team = setup.ranks[rank].team;
  char* const rows = rows_of(team, 0, 0);
  for (uint32_t epoch = 1; epoch <= kRounds; ++epoch) {
    const BlockRound round = round_of(setup, epoch);
    const auto expected = [&](int v) { return value(epoch, first_vector() + in_global(v)); };
    if (rank == 0) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) store16(rows + in_global(v) * 16, expected(v));
      publish_rows(setup, rank, round, 0);
      if (!wait_for_rows(setup, rank, round, kClosingStep)) return false;
      continue;
    }
    if (!wait_for_rows(setup, rank, round, 0)) return false;
    uint4 raw[kVectors];
    uint32_t read = 0;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      raw[v] = load16(rows + in_global(v) * 16);
      read |= raw[v].x;
    }
    if (sync_having(__uint_as_float(read)) && threadIdx.x == 0) signal_unfenced(team, round, kClosingStep, 0);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) wrong += differ(raw[v], expected(v));
  }
  return true;
}

#endif

}  // namespace tpf
