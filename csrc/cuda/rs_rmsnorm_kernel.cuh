// The two bodies of rs_rmsnorm_kernel, with and without the copy engine, and its launcher.
#pragma once
#include "launch.cuh"
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
  const int threads = blockDim.x;
  const auto column_of = [&](int v) { return (int64_t{v} * threads + threadIdx.x) * kLanes<T>; };
  const auto load_row = [&](uint4(&raw)[kVecs], const T* row) {
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
      raw[v] = column_of(v) < view.hidden ? load16(row + column_of(v)) : uint4{};
    }
  };
  bool arrived = true;
  const auto stage_chunk = [&](int chunk) {
    const int last = min((chunk + 1) * args.chunk_rows, static_cast<int>(args.largest_share));
    for (int step = chunk * args.chunk_rows; step < last; ++step) {
      const int64_t row = view.row_of(step);
      for (int offset = 1; offset < view.world_size; ++offset) {
        const int peer = (view.rank + offset) % view.world_size;
        const Rows rows = view.rows(peer);
        if (row >= rows.count) continue;
        uint4 raw[kVecs];
        load_row(raw, static_cast<const T*>(args.input) + (rows.start + row) * view.hidden);
        T* to = view.staged_row(peer, view.rank, row);
#pragma unroll
        for (int v = 0; v < kVecs; ++v) {
          if (column_of(v) < view.hidden) store16(to + column_of(v), raw[v]);
        }
      }
    }
    __syncthreads();
    publish_to_peers(view, round, chunk, threadIdx.x);
  };

  RowWeight<T, kVecs> weight;
  if constexpr (kEnding != Ending::kSum) weight.init(view, threads);
  if (view.staged()) {
    stage_chunk(0);
  } else {
    publish_to_peers(view, round, 0, threadIdx.x);
  }
  for (int chunk = 0; chunk < args.num_chunks; ++chunk) {
    if (view.staged() && chunk + 1 < args.num_chunks) stage_chunk(chunk + 1);
    if (view.staged() || chunk == 0) {
      arrived &= wait_for_peers(view, round, chunk, threadIdx.x);
      __syncthreads();
    }
    const int last = (chunk + 1) * args.chunk_rows;
    for (int step = chunk * args.chunk_rows; step < last; ++step) {
      const int64_t row = view.row_of(step);
      if (row >= view.own.count) break;
      float sums[kVecs][kLanes<T>];
#pragma unroll
      for (int v = 0; v < kVecs; ++v) {
        uint4 raw[TPF_MAX_RANKS + 1];
        const bool inside = column_of(v) < view.hidden;
#pragma unroll
        for (int source = 0; source < TPF_MAX_RANKS; ++source) {
          const bool used = inside && source < view.num_sources();
          raw[source] = used ? load16(view.source_row(source, row) + column_of(v)) : uint4{};
        }
        if (inside && view.has_residual()) {
          raw[TPF_MAX_RANKS] = load16(static_cast<const T*>(args.residual) + row * view.hidden + column_of(v));
        }
        unpack(sums[v], raw[0], T{});
#pragma unroll
        for (int source = 1; source < TPF_MAX_RANKS; ++source) {
          if (source < view.num_sources()) add_vector<T>(sums[v], raw[source]);
        }
        if (view.has_residual()) add_vector<T>(sums[v], raw[TPF_MAX_RANKS]);
      }
      finish_row<T, kVecs, kEnding>(view, row, sums, weight, partial + step % 2 * kMaxWarps, threads);
    }
    if constexpr (kEnding == Ending::kGather) {
      __syncthreads();
      const BlockRound next = {round.epoch + 1, round.contract, round.call_number, false};
      publish_to_peers(view, next, kGatherStep + chunk, threadIdx.x);
    }
  }
  if constexpr (kEnding == Ending::kGather) {
    const BlockRound next = {round.epoch + 1, round.contract, round.call_number, false};
    for (int chunk = 0; chunk < args.num_chunks; ++chunk) {
      arrived &= wait_for_peers(view, next, kGatherStep + chunk, threadIdx.x);
      __syncthreads();
      for (int step = chunk * args.chunk_rows; step < (chunk + 1) * args.chunk_rows; ++step) {
        const int64_t row = view.row_of(step);
        for (int offset = 1; offset < view.world_size; ++offset) {
          const int peer = (view.rank + offset) % view.world_size;
          const Rows rows = view.rows(peer);
          if (row >= rows.count) continue;
          uint4 raw[kVecs];
          load_row(raw, view.gathered_row(peer, row));
          T* to = static_cast<T*>(args.output) + (rows.start + row) * view.hidden;
#pragma unroll
          for (int v = 0; v < kVecs; ++v) {
            if (column_of(v) < view.hidden) store16(to + column_of(v), raw[v]);
          }
        }
      }
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

// The fetching warp: brings every source's version of this block's rows into the ring. The slot of a row in the ring
// follows the order in which the sources are added; where the ring holds a whole row, they are asked for in an order
// that begins with the next rank, so that the ranks do not all read from the same one.
template <typename T>
__device__ inline bool fetch_rows(const View<T>& view, const BlockRound& round, BulkShared& shared, char* ring) {
  const ReduceArgs& args = view.args;
  const int lane = threadIdx.x % 32;
  const uint32_t row_bytes = static_cast<uint32_t>(view.hidden * sizeof(T));
  const int sources = view.num_sources(), items = sources + view.has_residual();
  const int first = args.stages >= items ? (view.rank + 1) % sources : 0;
  bool arrived = true;
  uint32_t count = 0;  // items before this row
  for (int chunk = 0; chunk < args.num_chunks; ++chunk) {
    if (view.staged() || chunk == 0) {
      arrived &= wait_for_peers(view, round, chunk, lane);
      __syncwarp();
    }
    if (lane != 0) continue;
    fence_async_global();
    for (int step = chunk * args.chunk_rows; step < (chunk + 1) * args.chunk_rows; ++step) {
      const int64_t row = view.row_of(step);
      if (row >= view.own.count) break;
      for (int i = 0; i < items; ++i) {
        const int item = i < sources ? (first + i) % sources : i;
        const T* from =
            item < sources ? view.source_row(item, row) : static_cast<const T*>(args.residual) + row * view.hidden;
        const uint32_t index = count + item;
        const int stage = index % args.stages;
        if (index >= args.stages) barrier_wait(&shared.empty[stage], (index / args.stages - 1) & 1);
        barrier_expect(&shared.full[stage], row_bytes);
        bulk_load(ring + int64_t{stage} * row_bytes, from, row_bytes, &shared.full[stage]);
      }
      count += items;
    }
  }
  return arrived;
}

// The adding warps.
template <typename T, int kVecs, Ending kEnding>
__device__ inline bool add_rows(const View<T>& view, const BlockRound& round, BulkShared& shared, const char* ring,
                                float* partial) {
  const ReduceArgs& args = view.args;
  const int threads = blockDim.x - kHelperThreads;
  const int64_t row_bytes = view.hidden * sizeof(T);
  const int items = view.num_sources() + view.has_residual();
  RowWeight<T, kVecs> weight;
  if constexpr (kEnding != Ending::kSum) weight.init(view, threads);
  int stage = 0, parity = 0;
  for (int chunk = 0; chunk < args.num_chunks; ++chunk) {
    for (int step = chunk * args.chunk_rows; step < (chunk + 1) * args.chunk_rows; ++step) {
      const int64_t row = view.row_of(step);
      if (row >= view.own.count) break;
      float sums[kVecs][kLanes<T>];
      for (int item = 0; item < items; ++item) {
        barrier_wait(&shared.full[stage], parity);
#pragma unroll
        for (int v = 0; v < kVecs; ++v) {
          const int64_t at = (int64_t{v} * threads + threadIdx.x) * 16;
          const uint4 raw = at < row_bytes ? *reinterpret_cast<const uint4*>(ring + stage * row_bytes + at) : uint4{};
          if (item == 0) {
            unpack(sums[v], raw, T{});
          } else {
            add_vector<T>(sums[v], raw);
          }
        }
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(&shared.empty[stage]);
        if (++stage == args.stages) stage = 0, parity ^= 1;
      }
      finish_row<T, kVecs, kEnding>(view, row, sums, weight, partial + step % 2 * kMaxWarps, threads);
    }
    if constexpr (kEnding == Ending::kGather) {
      sync_threads(1, threads);
      const BlockRound next = {round.epoch + 1, round.contract, round.call_number, false};
      publish_to_peers(view, next, kGatherStep + chunk, threadIdx.x);
    }
  }
  return true;
}

template <typename T, int kVecs, Ending kEnding>
__device__ inline bool reduce_in_bulk(const View<T>& view, const BlockRound& round, float* partial) {
  extern __shared__ __align__(128) char dynamic[];
  __shared__ BulkShared shared;
  const int64_t row_bytes = view.hidden * sizeof(T);
  const int adding_warps = (blockDim.x - kHelperThreads) / 32;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < view.args.stages; ++stage) {
      barrier_init(&shared.full[stage], 1);
      barrier_init(&shared.empty[stage], adding_warps);
    }
    for (int stage = 0; stage < kCopierStages; ++stage) barrier_init(&shared.copied[stage], 1);
    fence_async_shared();
  }
  __syncthreads();
  const int warp = threadIdx.x / 32;
  char* ring = dynamic + (kEnding == Ending::kGather || view.staged() ? kCopierStages * row_bytes : 0);
  if (warp < adding_warps) return add_rows<T, kVecs, kEnding>(view, round, shared, ring, partial);
  if (warp == adding_warps) return move_rows<T, kEnding>(view, round, shared, dynamic);
  return fetch_rows<T>(view, round, shared, ring);
}

#endif

template <typename T, int kVecs, Ending kEnding, bool kBulk>
__global__ void __launch_bounds__(kMaxAddingThreads + (kBulk ? kHelperThreads : 0), 1)
    rs_rmsnorm_kernel(const __grid_constant__ ReduceArgs args) {
  __shared__ float partial[2 * kMaxWarps];
  const BlockRound round = begin_op(args.team, args.call, args.contract, kEnding == Ending::kGather ? 2 : 1);
  const View<T> view(args, round);
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

// ---- the launcher ----

inline ReduceArgs reduce_args(tpf_op op, void* residual_out, const void* input, const tpf_symm* input_symm,
                              const void* residual, const void* weight, const tpf_team* team, int64_t num_tokens,
                              int32_t hidden_size, tpf_dtype dtype, float eps, uint32_t variant) {
  ReduceArgs args = {};
  args.residual_out = residual_out;
  args.input = input;
  args.residual = residual;
  args.weight = weight;
  if (input_symm != nullptr) args.symm = *input_symm;
  args.team = *team;
  args.call = reduce_call(op, dtype, num_tokens, hidden_size, input_symm, variant);
  args.eps = eps;
  return args;
}

template <Ending kEnding>
struct ReduceLauncher {
  template <typename T, int kVecs, bool kBulk>
  static tpf_status launch(ReduceArgs& args, const Device& device, int grid, int threads, tpf_stream stream) {
    size_t shared_bytes = 0;
    if (kBulk) {
      const int64_t row_bytes = int64_t{args.call.hidden_size} * sizeof(T);
      const bool copies = kEnding == Ending::kGather || (args.call.source < 0 && args.team.world_size > 1);
      const int64_t copier_bytes = copies ? kCopierStages * row_bytes : 0;
      args.stages = static_cast<int>(
          std::min<int64_t>(kMaxStages, (device.shared_bytes - kStaticSharedBytes - copier_bytes) / row_bytes));
      shared_bytes = copier_bytes + args.stages * row_bytes;
    }
    return launch_kernel(rs_rmsnorm_kernel<T, kVecs, kEnding, kBulk>, args, device, grid,
                         threads + (kBulk ? kHelperThreads : 0), shared_bytes, stream);
  }

  template <typename T, int kVecs>
  static tpf_status choose_body(ReduceArgs& args, const Device& device, int grid, int threads, tpf_stream stream) {
    // Three rows of the ring are the least that overlaps anything.
    const int64_t row_bytes = int64_t{args.call.hidden_size} * sizeof(T);
    const bool fits = (kCopierStages + 3) * row_bytes <= device.shared_bytes - kStaticSharedBytes;
    if (device.has_bulk_copies && fits) return launch<T, kVecs, true>(args, device, grid, threads, stream);
    return launch<T, kVecs, false>(args, device, grid, threads, stream);
  }

  template <typename T>
  static tpf_status choose_width(ReduceArgs& args, const Device& device, int grid, tpf_stream stream) {
    constexpr int kFew = sizeof(T) == 4 ? 4 : 2, kMany = sizeof(T) == 4 ? 10 : 5;
    static_assert(kMaxAddingThreads * kMany * kLanes<T> >= TPF_MAX_HIDDEN_SIZE);
    const int vectors = static_cast<int>(args.call.hidden_size) / kLanes<T>;
    const auto threads = [&](int vecs) { return (vectors + vecs * 32 - 1) / (vecs * 32) * 32; };
    if (threads(kFew) <= kMaxAddingThreads) return choose_body<T, kFew>(args, device, grid, threads(kFew), stream);
    return choose_body<T, kMany>(args, device, grid, threads(kMany), stream);
  }

  static tpf_status run(ReduceArgs& args, tpf_stream stream) {
    Device device;
    if (const tpf_status status = use_device(&device, args.team.device); status != TPF_OK) return status;
    // The grid depends on the call and on what the workspace was made with: the same on all ranks.
    args.contract = contract_of(args.call);
    args.largest_share = rows_of(args.call.num_tokens, 0, args.team.world_size).count;
    const Blocks blocks = share_out(args.largest_share, args.team.max_ctas);
    args.chunk_rows = std::max((blocks.rows + kMaxChunks - 1) / kMaxChunks, std::min(blocks.rows, 2));
    args.num_chunks = std::max(1, (blocks.rows + args.chunk_rows - 1) / std::max(1, args.chunk_rows));
    switch (args.call.dtype) {
      case TPF_BF16:
        return choose_width<__nv_bfloat16>(args, device, blocks.grid, stream);
      case TPF_F16:
        return choose_width<__half>(args, device, blocks.grid, stream);
      case TPF_F32:
        return choose_width<float>(args, device, blocks.grid, stream);
      default:
        return TPF_UNSUPPORTED;
    }
  }
};

}  // namespace tpf
