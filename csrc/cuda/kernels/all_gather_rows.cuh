// all_gather_rows_kernel: every rank stages its rows in its own slot, then copies the others'. all_gather_rows and
// the gathering half of the projections are this kernel.
//
// Rows come in parts that all ranks want as tensors of their own: one, quantised rows and their scales, or three of a
// latent. In a slot, too, the rows of a part lie one after the other. In qkv_a_proj_ag_norm the owner of a row
// normalises its parts as it stages them: once, where all ranks would do it after the gather.
//
// A share is dealt out in chunks: the first ones of all blocks side by side, then the second ones, ... So all blocks
// are in the same few pages at a time. Chunk c of a block is published at step c, and may be copied while chunk c + 1
// is being staged. So block b waits for the peers' blocks b alone.
//
// Two bodies. Direct: all threads stage a chunk, then copy the peers', some warps for each peer. Bulk, by TMA, from
// sm_90 on: the last warp copies while the others stage.
#pragma once
#include <type_traits>

#include "../../plan/gather.h"
#include "../comm/bulk_copier.cuh"
#include "../comm/peers.cuh"
#include "../ptx/vec.cuh"
#include "latent_norm.cuh"

namespace tpf {

constexpr int kGatherParts = 3;
constexpr int kHeldVectors = 8;  // of a lane, in a part to be normalised

struct GatherPart {
  char* output;        // [num_tokens, columns]
  const void* weight;  // of the norm; null where there is none
  int64_t row_bytes;
  int64_t row_offset;   // where the part begins in a row of all parts
  int64_t slot_offset;  // where its rows begin in a slot
  const char* input;    // this rank's, where parts are tensors of their own
};

struct GatherArgs {
  GatherPart parts[kGatherParts];
  int32_t num_parts;
  float eps, weight_addend;
  bool float_weights;
  const char* input;  // this rank's rows, all parts; of parts that are tensors of their own, the first
  int64_t row_bytes;
  tpf_team team;
  tpf_call call;
  uint32_t fingerprint;
  Partition partition;
  int32_t block_rows;  // of a share, for one block, at most
  int32_t chunk_rows;
  int32_t num_chunks;
  bool vectors;  // everything begins at a multiple of 16 bytes
};

// The rows of this block's chunk `chunk` in a share of `count` rows.
__device__ inline Rows chunk_of(const GatherArgs& args, int64_t count, int chunk) {
  const int done = chunk * args.chunk_rows, rows = min(args.chunk_rows, args.block_rows - done);  // of each block
  const int64_t start = int64_t{done} * gridDim.x + int64_t{blockIdx.x} * rows;
  return {start, max(min(int64_t{rows}, count - start), int64_t{0})};
}

// One part of them: where its owner stages it, where it goes, and how long it is.
struct Piece {
  __device__ Piece(const GatherArgs& args, uint32_t epoch, int owner, int chunk, const GatherPart& part) {
    const Rows share = args.partition.rows(owner), rows = chunk_of(args, share.count, chunk);
    staged = slot_of(args.team, owner, epoch) + part.slot_offset + rows.start * part.row_bytes;
    output = part.output + (share.start + rows.start) * part.row_bytes;
    bytes = rows.count * part.row_bytes;
  }
  char* staged;
  char* output;
  int64_t bytes;
};

// Copies to one place, or two, with `threads` threads. A warp has kDepth x 512 bytes at a time, and all its loads are
// in flight before the first store.
template <int kDepth = 8>
__device__ inline void copy_piece(char* to, char* also, const char* from, int64_t bytes, int thread, int threads,
                                  bool vectors) {
  if (!vectors) {
    for (int64_t at = thread; at < bytes; at += threads) {
      const char byte = *reinterpret_cast<const volatile char*>(from + at);
      to[at] = byte;
      if (also != nullptr) also[at] = byte;
    }
    return;
  }
  const int first = (thread / 32 * 32 * kDepth + thread % 32) * 16;
  for (int64_t at = first; at < bytes; at += threads * kDepth * 16) {
    const int64_t left = bytes - at;
    uint4 raw[kDepth];
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      if (i * 512 < left) raw[i] = load16(from + at + i * 512);
    }
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      if (i * 512 < left) store16(to + at + i * 512, raw[i]);
      if (i * 512 < left && also != nullptr) store16(also + at + i * 512, raw[i]);
    }
  }
}

template <typename T, int kWidth>
__device__ inline void store_columns(T* to, const float (&values)[kWidth]) {
  if constexpr (kWidth == kLanes<T>) {
    store16(to, pack(values, T{}));
  } else {
    *to = static_cast<T>(values[0]);
  }
}

template <typename T>
using HeldPart = NormedPart<T, kHeldVectors>;

// RMSNorm of one part of a row, by one warp, which `load(held)` gives it; `store(v, vector)` gets the lane's vectors. A
// weight of the part's dtype is loaded before, so that both are on their way at the same time.
template <typename T, typename Load, typename Store>
__device__ inline void norm_held_part(const GatherArgs& args, const GatherPart& part, Load&& load, Store&& store) {
  const int columns = static_cast<int>(part.row_bytes / sizeof(T));
  HeldPart<T> held;
  load(held);
  uint4 weights[kHeldVectors];
#pragma unroll
  for (int v = 0; v < kHeldVectors; ++v) {
    const int column = held.column_of(v);
    if (column >= columns || args.float_weights) break;
    weights[v] = __ldg(reinterpret_cast<const uint4*>(static_cast<const T*>(part.weight) + column));
  }
  held.norm(
      columns, args.eps,
      [&](float (&values)[kLanes<T>], int v) {
        if (args.float_weights) {
          return load_norm_weight<T>(values, part.weight, held.column_of(v), true, args.weight_addend);
        }
        unpack(values, weights[v], T{});
#pragma unroll
        for (float& value : values) value += args.weight_addend;
      },
      store);
}

// A vector of a row, or a single column. Not through the read-only path: peers may have written it.
template <typename T, int kWidth>
__device__ inline void load_columns(float (&values)[kWidth], const T* from) {
  if constexpr (kWidth == kLanes<T>) {
    unpack(values, load16(from), T{});
  } else {
    values[0] = static_cast<float>(*from);
  }
}

// The same of more columns, or of single ones. At the second look the row is in a cache.
template <typename T, int kWidth>
__device__ inline void norm_part(const GatherArgs& args, char* to, char* also, const char* from, const GatherPart& part,
                                 int lane) {
  const int columns = static_cast<int>(part.row_bytes / sizeof(T));
  const T* const row = reinterpret_cast<const T*>(from);
  float squares = 0;
#pragma unroll 2
  for (int column = lane * kWidth; column < columns; column += 32 * kWidth) {
    float values[kWidth];
    load_columns(values, row + column);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) squares = fmaf(values[i], values[i], squares);
  }
  const float rstd = __frsqrt_rn(warp_sum(squares) / static_cast<float>(columns) + args.eps);
#pragma unroll 2
  for (int column = lane * kWidth; column < columns; column += 32 * kWidth) {
    float values[kWidth], scaled[kWidth];
    load_columns(values, row + column);
    load_norm_weight<T>(scaled, part.weight, column, args.float_weights, args.weight_addend);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) scaled[i] *= values[i] * rstd;
    store_columns<T>(reinterpret_cast<T*>(to) + column, scaled);
    if (also != nullptr) store_columns<T>(reinterpret_cast<T*>(also) + column, scaled);
  }
}

// One part of one row, by a warp: normalised where it has a weight.
template <typename T>
__device__ inline void finish_part(const GatherArgs& args, char* to, char* also, const char* from,
                                   const GatherPart& part) {
  const int lane = threadIdx.x % 32;
  if (part.weight == nullptr) {
    copy_piece<1>(to, also, from, part.row_bytes, lane, 32, args.vectors);
  } else if (args.vectors && part.row_bytes <= HeldPart<T>::kMaxColumns * int64_t{sizeof(T)}) {
    norm_held_part<T>(
        args, part,
        [&](HeldPart<T>& held) {
          held.load(reinterpret_cast<const T*>(from), static_cast<int>(part.row_bytes / sizeof(T)));
        },
        [&](int v, uint4 vector) {
          store16(to + lane * 16 + v * 512, vector);
          if (also != nullptr) store16(also + lane * 16 + v * 512, vector);
        });
  } else if (args.vectors) {
    norm_part<T, kLanes<T>>(args, to, also, from, part, lane);
  } else {
    norm_part<T, 1>(args, to, also, from, part, lane);
  }
}

// Writes this rank's rows of a chunk to its slot, if there are peers, and to its own outputs. T: of the norms' weights;
// void where nothing is normalised.
template <typename T>
__device__ inline void stage_rows(const GatherArgs& args, uint32_t epoch, int chunk, int threads) {
  const int rank = args.team.rank, thread = threadIdx.x;
  const bool has_peers = args.team.world_size > 1;
  const Rows rows = chunk_of(args, args.partition.rows(rank).count, chunk);
  if constexpr (std::is_void_v<T>) {
    for (int p = 0; p < args.num_parts; ++p) {
      const GatherPart& part = args.parts[p];
      const Piece piece(args, epoch, rank, chunk, part);
      copy_piece(piece.output, has_peers ? piece.staged : nullptr, part.input + rows.start * part.row_bytes,
                 piece.bytes, thread, threads, args.vectors);
    }
  } else {
    const char* input = args.input + rows.start * args.row_bytes;
    // A warp takes one part of one row: the first parts of all rows, then the second, ...
    const int count = static_cast<int>(rows.count);
    for (int task = thread / 32; task < args.num_parts * count; task += threads / 32) {
      const GatherPart& part = args.parts[task / count];
      const int row = task % count;
      const Piece piece(args, epoch, rank, chunk, part);
      char* to = piece.output + row * part.row_bytes;
      char* also = has_peers ? piece.staged + row * part.row_bytes : nullptr;
      finish_part<T>(args, to, also, input + row * args.row_bytes + part.row_offset, part);
    }
  }
}

// Stages a chunk and publishes it. By the first `threads` threads of the block.
template <typename T>
__device__ inline void publish_chunk(const GatherArgs& args, const BlockRound& round, int chunk, int threads) {
  stage_rows<T>(args, round.epoch, chunk, threads);
  asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory");
  publish_to_peers(args.team, round, chunk, threadIdx.x);
}

// Copies a chunk of all peers' rows: the warps of the block are dealt out to the peers.
__device__ inline void copy_chunk(const GatherArgs& args, uint32_t epoch, int chunk) {
  const int peers = args.team.world_size - 1;
  if (peers == 0) return;
  const int threads = kGatherThreads / 32 / peers * 32, offset = 1 + threadIdx.x / threads;
  if (offset > peers) return;
  const int owner = (args.team.rank + offset) % args.team.world_size;
  for (int p = 0; p < args.num_parts; ++p) {
    const Piece piece(args, epoch, owner, chunk, args.parts[p]);
    copy_piece(piece.output, nullptr, piece.staged, piece.bytes, threadIdx.x % threads, threads, args.vectors);
  }
}

// A chunk is copied when the next one has been staged.
template <typename T>
__device__ inline bool gather_directly(const GatherArgs& args, const BlockRound& round) {
#pragma unroll 1
  for (int next = 0; next <= args.num_chunks; ++next) {
    if (next < args.num_chunks) publish_chunk<T>(args, round, next, kGatherThreads);
    if (next == 0) continue;
    if (!__syncthreads_and(wait_for_peers(args.team, args.call, round, next - 1, threadIdx.x))) return false;
    pdl_trigger();  // as in reduce_one_row
    copy_chunk(args, round.epoch, next - 1);
  }
  return true;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// The last warp. Peers take turns item by item: all ranks are then at about the same rows, and where ranks share a
// card, its L2 cache answers most of them.
__device__ inline bool copy_in_bulk(const GatherArgs& args, const BlockRound& round, uint64_t* barriers, char* items) {
  const int lane = threadIdx.x % 32;
  BulkCopier copier(items, barriers, kGatherItemBytes);
  const uint64_t policy = streaming_policy();
  bool arrived = true;
  for (int chunk = 0; chunk < args.num_chunks && arrived; ++chunk) {
    arrived = wait_for_peers(args.team, args.call, round, chunk, lane);
    __syncwarp();
    arrived = __all_sync(0xffffffffu, arrived);
    if (!arrived) continue;
    fence_async_global();
#pragma unroll 1
    for (int p = 0; p < args.num_parts; ++p) {
      const int64_t longest = args.chunk_rows * args.parts[p].row_bytes;
#pragma unroll 1
      for (int64_t at = 0; at < longest; at += kGatherItemBytes) {
        for_peers(args.team, [&](int peer) {
          const Piece piece(args, round.epoch, peer, chunk, args.parts[p]);
          const uint32_t bytes = static_cast<uint32_t>(min(piece.bytes - at, int64_t{kGatherItemBytes}));
          if (at < piece.bytes) copier.copy(piece.output + at, piece.staged + at, bytes, policy);
        });
      }
    }
  }
  copier.flush();
  fence_async_global();  // what was copied may be overwritten with NaN
  return arrived;
}

#endif

// Of a block that saw a fault: its chunks of all ranks' rows.
__device__ inline void poison_chunks(const GatherArgs& args, uint32_t epoch) {
  for (int chunk = 0; chunk < args.num_chunks; ++chunk) {
    for (int owner = 0; owner < args.team.world_size; ++owner) {
      for (int p = 0; p < args.num_parts; ++p) {
        const Piece piece(args, epoch, owner, chunk, args.parts[p]);
        poison(piece.output, piece.bytes, threadIdx.x, kGatherThreads);
      }
    }
  }
}

template <typename T, bool kBulk>
__global__ void __launch_bounds__(kGatherThreads, 1) all_gather_rows_kernel(const __grid_constant__ GatherArgs args) {
  pdl_wait();
  if constexpr (kBulk) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    extern __shared__ __align__(128) char items[];
    __shared__ uint64_t barriers[kCopierStages];
    if (threadIdx.x == 0) {
      for (uint64_t& barrier : barriers) barrier_init(&barrier, 1);
      fence_async_shared();
    }
    const BlockRound round = begin_op(args.team, args.call, args.fingerprint, 1);
    constexpr int kOpening = kGatherThreads - 32;
    bool arrived = !round.refused;
    if (arrived && threadIdx.x >= kOpening) {
      arrived = copy_in_bulk(args, round, barriers, items);
    } else if (arrived) {
      for (int chunk = 0; chunk < args.num_chunks; ++chunk) publish_chunk<T>(args, round, chunk, kOpening);
    }
    if (__syncthreads_and(arrived)) return end_op(args.team);
    poison_chunks(args, round.epoch);
    end_faulted_op(args.team, args.call, round);
#endif
  } else {
    const BlockRound round = begin_op(args.team, args.call, args.fingerprint, 1);
    if (__syncthreads_and(!round.refused && gather_directly<T>(args, round))) return end_op(args.team);
    poison_chunks(args, round.epoch);
    end_faulted_op(args.team, args.call, round);
  }
}

}  // namespace tpf
