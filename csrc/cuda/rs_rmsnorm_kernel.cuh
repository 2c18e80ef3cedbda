// rs_rmsnorm_kernel and its two bodies, with and without the copy engine.
#pragma once
#include "rs_rmsnorm.cuh"

namespace tpf {

template <typename T>
__device__ inline void add_vector(float (&sums)[kLanes<T>], uint4 raw) {
  float values[kLanes<T>];
  unpack(values, raw, T{});
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) sums[i] += values[i];
}

// ---- every thread copies and adds by itself ----

template <typename T, int kVecs, Ending kEnding>
__device__ inline bool reduce_directly(const View<T>& view, const BlockRound& round, float* partial) {
  const ReduceArgs& args = view.args;
  const Group group = {static_cast<int>(blockDim.x), static_cast<int>(threadIdx.x), partial};
  const auto column_of = [&](int v) { return (v * group.threads + group.thread) * kLanes<T>; };
  // For every peer that has row `row`: to(peer) <- from(peer). All loads are on their way before the first store.
  const auto copy_rows = [&](int64_t row, auto&& to, auto&& from) {
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
      if (column_of(v) >= view.hidden) break;
      uint4 raw[TPF_MAX_RANKS];
#pragma unroll
      for (int peer = 0; peer < TPF_MAX_RANKS; ++peer) {
        if (peer < view.world_size && peer != view.rank && row < view.rows(peer).count) {
          raw[peer] = load16(from(peer) + column_of(v));
        }
      }
#pragma unroll
      for (int peer = 0; peer < TPF_MAX_RANKS; ++peer) {
        if (peer < view.world_size && peer != view.rank && row < view.rows(peer).count) {
          store16(to(peer) + column_of(v), raw[peer]);
        }
      }
    }
  };
  const auto stage_chunk = [&](int chunk) {
#pragma unroll 1
    for (int step = chunk * args.chunk_rows; step < (chunk + 1) * args.chunk_rows; ++step) {
      const int64_t row = view.row_of(step);
      copy_rows(
          row, [&](int peer) { return view.staged_row(peer, view.rank, row); },
          [&](int peer) { return static_cast<const T*>(args.input) + (view.rows(peer).start + row) * view.hidden; });
    }
    __syncthreads();
    publish_to_peers(view, round, chunk, threadIdx.x);
  };

  bool arrived = true;
  if (view.staged()) {
    stage_chunk(0);
  } else {
    publish_to_peers(view, round, 0, threadIdx.x);
  }
  RowWeight<T, kVecs> weight;
  if constexpr (kEnding != Ending::kSum) weight.init(view, group);
  const BlockRound next = {round.epoch + 1, round.contract, round.call_number, false};
#pragma unroll 1
  for (int chunk = 0; chunk < args.num_chunks; ++chunk) {
    if (view.staged() && chunk + 1 < args.num_chunks) stage_chunk(chunk + 1);
    if (view.staged() || chunk == 0) {
      arrived &= wait_for_peers(view, round, chunk, threadIdx.x);
      __syncthreads();
    }
#pragma unroll 1
    for (int step = chunk * args.chunk_rows; step < (chunk + 1) * args.chunk_rows; ++step) {
      const int64_t row = view.row_of(step);
      if (row >= view.own.count) break;
      float sums[kVecs][kLanes<T>];
#pragma unroll
      for (int v = 0; v < kVecs; ++v) {
        uint4 raw[TPF_MAX_RANKS + 1] = {};
        if (column_of(v) < view.hidden) {
#pragma unroll
          for (int source = 0; source < TPF_MAX_RANKS; ++source) {
            if (source < view.num_sources()) raw[source] = load16(view.source_row(source, row) + column_of(v));
          }
          if (view.has_residual()) {
            raw[TPF_MAX_RANKS] = load16(static_cast<const T*>(args.residual) + row * view.hidden + column_of(v));
          }
        }
        unpack(sums[v], raw[0], T{});
#pragma unroll
        for (int source = 1; source < TPF_MAX_RANKS; ++source) {
          if (source < view.num_sources()) add_vector<T>(sums[v], raw[source]);
        }
        if (view.has_residual()) add_vector<T>(sums[v], raw[TPF_MAX_RANKS]);
      }
      finish_row<T, kVecs, kEnding>(view, row, sums, weight, group, step % 2);
    }
    if constexpr (kEnding == Ending::kGather) {
      __syncthreads();
      publish_to_peers(view, next, kGatherStep + chunk, threadIdx.x);
    }
  }
#pragma unroll 1
  for (int chunk = 0; kEnding == Ending::kGather && chunk < args.num_chunks; ++chunk) {
    arrived &= wait_for_peers(view, next, kGatherStep + chunk, threadIdx.x);
    __syncthreads();
#pragma unroll 1
    for (int step = chunk * args.chunk_rows; step < (chunk + 1) * args.chunk_rows; ++step) {
      const int64_t row = view.row_of(step);
      copy_rows(
          row, [&](int peer) { return static_cast<T*>(args.output) + (view.rows(peer).start + row) * view.hidden; },
          [&](int peer) { return view.gathered_row(peer, row); });
    }
  }
  return arrived;
}

// ---- the copy engine moves rows ----

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

struct BulkShared {
  alignas(8) uint64_t full[kMaxStages];
  alignas(8) uint64_t empty[kMaxStages];
  alignas(8) uint64_t copied[kCopierStages];
};

// The staging warp: lays this rank's rows open to the peers, chunk by chunk; in rs_rmsnorm_ag it then collects theirs.
template <typename T, Ending kEnding>
__device__ inline bool move_rows(const View<T>& view, const BlockRound& round, BulkShared& shared, char* buffers) {
  const ReduceArgs& args = view.args;
  const int lane = threadIdx.x % 32;
  const uint32_t row_bytes = static_cast<uint32_t>(view.hidden * sizeof(T));
  BulkCopier copier(buffers, shared.copied, row_bytes);
  bool arrived = true;
  // from_to(peer, row, rows of the peer) for all peers' rows of a chunk
  const auto for_chunk = [&](int chunk, auto&& copy_row) {
    for (int step = chunk * args.chunk_rows; step < (chunk + 1) * args.chunk_rows; ++step) {
      const int64_t row = view.row_of(step);
      if (row >= args.largest_share) break;
      for (int offset = 1; offset < view.world_size; ++offset) {
        const int peer = (view.rank + offset) % view.world_size;
        const Rows rows = view.rows(peer);
        if (row < rows.count) copy_row(peer, row, rows);
      }
    }
  };
  const int staged_chunks = view.staged() ? args.num_chunks : 1;
  for (int chunk = 0; chunk < staged_chunks; ++chunk) {
    if (lane == 0 && view.staged()) {
      for_chunk(chunk, [&](int peer, int64_t row, Rows rows) {
        copier.copy(reinterpret_cast<char*>(view.staged_row(peer, view.rank, row)),
                    reinterpret_cast<const char*>(static_cast<const T*>(args.input) + (rows.start + row) * view.hidden),
                    row_bytes);
      });
      copier.flush();
      fence_async_global();
    }
    __syncwarp();
    publish_to_peers(view, round, chunk, lane);
  }
  if constexpr (kEnding == Ending::kGather) {
    const BlockRound next = {round.epoch + 1, round.contract, round.call_number, false};
    for (int chunk = 0; chunk < args.num_chunks; ++chunk) {
      arrived &= wait_for_peers(view, next, kGatherStep + chunk, lane);
      __syncwarp();
      if (lane == 0) {
        fence_async_global();
        for_chunk(chunk, [&](int peer, int64_t row, Rows rows) {
          copier.copy(reinterpret_cast<char*>(static_cast<T*>(args.output) + (rows.start + row) * view.hidden),
                      reinterpret_cast<const char*>(view.gathered_row(peer, row)), row_bytes);
        });
      }
      __syncwarp();
    }
    if (lane == 0) copier.flush();
  }
  return arrived;
}

// A position in the ring, and how often the ring has been gone round before it.
struct RingPosition {
  __device__ void advance(int items, int stages) {
    for (stage += items; stage >= stages; stage -= stages) ++round;
  }
  int stage = 0;
  uint32_t round = 0;
};

// The fetching warp: brings every source's version of this block's rows into the ring. Each lane fetches one source's,
// the lane after them the residual's.
template <typename T>
__device__ inline bool fetch_rows(const View<T>& view, const BlockRound& round, BulkShared& shared, char* ring) {
  const ReduceArgs& args = view.args;
  const int lane = threadIdx.x % 32;
  const uint32_t row_bytes = static_cast<uint32_t>(view.hidden * sizeof(T));
  const int sources = view.num_sources(), items = sources + view.has_residual();
  const int source = view.complete ? view.rank : lane;
  const T* const from = lane < sources ? view.source_row(source, 0) : static_cast<const T*>(args.residual);
  RingPosition at;
  at.advance(lane, args.stages);
  bool arrived = true;
  for (int chunk = 0; chunk < args.num_chunks; ++chunk) {
    if (view.staged() || chunk == 0) {
      arrived &= wait_for_peers(view, round, chunk, lane);
      __syncwarp();
    }
    if (lane >= items) continue;
    fence_async_global();
    for (int step = chunk * args.chunk_rows; step < (chunk + 1) * args.chunk_rows; ++step) {
      const int64_t row = view.row_of(step);
      if (row >= view.own.count) break;
      if (at.round > 0) barrier_wait(&shared.empty[at.stage], (at.round - 1) & 1);
      barrier_expect(&shared.full[at.stage], row_bytes);
      bulk_load(ring + at.stage * int64_t{row_bytes}, from + row * view.hidden, row_bytes, &shared.full[at.stage]);
      at.advance(items, args.stages);
    }
  }
  return arrived;
}

// The adding warps. The next source's vectors are on their way from shared memory while one source's are added.
template <typename T, int kVecs, Ending kEnding>
__device__ inline void add_rows(const View<T>& view, const BlockRound& round, BulkShared& shared, const char* ring,
                                const Group& group) {
  const ReduceArgs& args = view.args;
  const int row_bytes = static_cast<int>(view.hidden * sizeof(T));
  const int items = view.num_sources() + view.has_residual();
  RowWeight<T, kVecs> weight;
  if constexpr (kEnding != Ending::kSum) weight.init(view, group);
  RingPosition at;
  // Takes the next row buffer out of the ring and into registers.
  const auto take = [&](uint4(&raw)[kVecs]) {
    barrier_wait(&shared.full[at.stage], at.round & 1);
    const char* from = ring + at.stage * row_bytes;
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
      const int byte = (v * group.threads + group.thread) * 16;
      raw[v] = byte < row_bytes ? *reinterpret_cast<const uint4*>(from + byte) : uint4{};
    }
    __syncwarp();
    if (group.thread % 32 == 0) barrier_arrive(&shared.empty[at.stage]);
    at.advance(1, args.stages);
  };
  for (int chunk = 0; chunk < args.num_chunks; ++chunk) {
#pragma unroll 1
    for (int step = chunk * args.chunk_rows; step < (chunk + 1) * args.chunk_rows; ++step) {
      const int64_t row = view.row_of(step);
      if (row >= view.own.count) break;
      float sums[kVecs][kLanes<T>];
      uint4 raw[2][kVecs];
      take(raw[0]);
#pragma unroll
      for (int v = 0; v < kVecs; ++v) unpack(sums[v], raw[0][v], T{});
      if (items > 1) take(raw[0]);
#pragma unroll 1
      for (int item = 1; item < items; item += 2) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (item + half >= items) break;
          if (item + half + 1 < items) take(raw[1 - half]);
#pragma unroll
          for (int v = 0; v < kVecs; ++v) add_vector<T>(sums[v], raw[half][v]);
        }
      }
      finish_row<T, kVecs, kEnding>(view, row, sums, weight, group, step % 2);
    }
    if constexpr (kEnding == Ending::kGather) {
      group.sync();
      const BlockRound next = {round.epoch + 1, round.contract, round.call_number, false};
      publish_to_peers(view, next, kGatherStep + chunk, threadIdx.x);
    }
  }
}

template <typename T, int kVecs, Ending kEnding>
__device__ inline bool reduce_in_bulk(const View<T>& view, const BlockRound& round, float* partial) {
  extern __shared__ __align__(128) char dynamic[];
  __shared__ BulkShared shared;
  const int adding_threads = blockDim.x - kHelperThreads;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < view.args.stages; ++stage) {
      barrier_init(&shared.full[stage], 1);
      barrier_init(&shared.empty[stage], adding_threads / 32);
    }
    for (int stage = 0; stage < kCopierStages; ++stage) barrier_init(&shared.copied[stage], 1);
    fence_async_shared();
  }
  __syncthreads();
  const int64_t row_bytes = view.hidden * sizeof(T);
  char* ring = dynamic + (kEnding == Ending::kGather || view.staged() ? kCopierStages * row_bytes : 0);
  if (threadIdx.x < adding_threads) {
    const Group group = {adding_threads, static_cast<int>(threadIdx.x), partial};
    add_rows<T, kVecs, kEnding>(view, round, shared, ring, group);
    return true;
  }
  const bool moves = threadIdx.x < adding_threads + 32;
  return moves ? move_rows<T, kEnding>(view, round, shared, dynamic) : fetch_rows<T>(view, round, shared, ring);
}

#endif

template <typename T, int kVecs, Ending kEnding, bool kBulk>
__global__ void __launch_bounds__(kBulk        ? kMaxAddingThreads + kHelperThreads
                                  : kVecs <= 2 ? kMaxAddingThreads
                                               : kFewThreads,
                                  1) rs_rmsnorm_kernel(const __grid_constant__ ReduceArgs args) {
  __shared__ float partial[2 * kMaxWarps];
  __shared__ Rows shares[TPF_MAX_RANKS];
  fill_shares(shares, args);
  const BlockRound round = begin_op(args.team, args.call, args.contract, kEnding == Ending::kGather ? 2 : 1);
  const View<T> view(args, round, shares);
  bool arrived = !round.refused;
  if (arrived) {
    if constexpr (kBulk) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
      arrived = reduce_in_bulk<T, kVecs, kEnding>(view, round, partial);
#endif
    } else {
      arrived = reduce_directly<T, kVecs, kEnding>(view, round, partial);
    }
    // The input is the caller's again when this kernel ends: all peers must have read it. In rs_rmsnorm_ag the
    // gathering says so already.
    arrived = __syncthreads_and(arrived);
    if (view.zero_copy && kEnding != Ending::kGather) {
      publish_to_peers(view, round, kClosingStep, threadIdx.x);
      arrived &= __syncthreads_and(wait_for_peers(view, round, kClosingStep, threadIdx.x));
    }
  }
  if (!arrived) poison_rows<T, kEnding>(view);
}

}  // namespace tpf
