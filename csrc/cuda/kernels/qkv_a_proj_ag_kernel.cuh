// qkv_a_proj_ag_kernel, and its copying warps.
#pragma once
#include "../gemm/sm90_epilogue.cuh"
#include "../gemm/sm90_mainloop.cuh"
#include "qkv_a_proj_ag_finish.cuh"

namespace tpf {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// By a warp group that multiplies: its part of all tiles of this block.
template <typename Tiles, typename Out, bool kNorm>
__device__ inline void multiply_tiles(const ProjectionArgs& args, const BlockRound& round, ProjectionShared& shared,
                                      int group, char* stages, const float* scales) {
  const GroupPart part = part_of<Tiles>(group);
  AtomicRef<uint32_t, kBlockScope> stored(shared.stored);
  Mainloop<Tiles> mainloop(args, shared, stages, scales, group);
  for_tiles<Tiles>(args, [&](Tile tile) {
    typename Mainloop<Tiles>::Accumulators accumulators;
    const int stage = mainloop.multiply(accumulators);
    store_tile<Tiles, Out, kNorm>(args, round, tile, part, stages + stage * Tiles::kStageBytes, accumulators);
    mainloop.give_back(stage);
    if (threadIdx.x % 32 == 0) stored.fetch_add(1, order::memory_order_release);
  });
}

// What a copying warp moves at once. Without norms a run of bytes of the latent, `at` its first; with norms some whole
// rows, `at` the first of them.
struct RowPiece {
  int64_t at;
  uint32_t bytes;
};

// Where tiles are the output, a refused block's: nobody else writes them. By the copying warps of the block.
template <typename Tiles, typename Out>
__device__ inline void poison_tiles(const ProjectionArgs& args) {
  const int lane = threadIdx.x % 32;
  const int64_t rows = args.partition.rows(args.team.rank).count;
  for_tiles<Tiles>(args, [&](Tile tile) {
    for (int i = threadIdx.x / 32; i < Tiles::kRows; i += kCopiers) {
      const int64_t row = int64_t{tile.row_block} * Tiles::kRows + i;
      if (row >= rows) break;
      for (int column = lane; column < Tiles::kMainColumns + Tiles::kTail; column += 32) {
        const int at = column_of<Tiles>(args, tile.column_tile, column);
        if (at < args.call.columns)
          poison(args.outputs[0] + (row * args.call.columns + at) * sizeof(Out), sizeof(Out), 0, 1);
      }
    }
  });
}

// Copies finished rows of all ranks to the outputs. Pieces of a row block go round the grid's copying warps.
template <typename Tiles, typename Out, bool kNorm, int kBuffers>
__device__ inline void copy_row_blocks(const ProjectionArgs& args, const BlockRound& round, int copier, char* buffers,
                                       uint64_t* barriers) {
  const int lane = threadIdx.x % 32, world_size = args.team.world_size, copiers = gridDim.x * kCopiers;
  if (is_output<kNorm>(args)) {
    if (round.refused) poison_tiles<Tiles, Out>(args);
    return;
  }
  constexpr int kBufferBytes = SharedBytes<Tiles, kNorm>::buffer_bytes(kBuffers);
  const int row_bytes = args.call.columns * sizeof(Out);
  const int piece_bytes = kNorm ? kBufferBytes / row_bytes * row_bytes : kBufferBytes;
  const int unused = unused_bytes<Tiles, kNorm>(args);
  // store(where a piece of an output lies, the same in the piece of rows, bytes) for all there are
  const auto for_outputs = [&](const RowPiece& piece, auto&& store) {
    if constexpr (!kNorm) {
      store(args.outputs[0] + piece.at, 0, piece.bytes);
    } else {
      uint32_t done = 0;
      for (int64_t row = piece.at; done < piece.bytes; ++row, done += unused) {
        for (int part = 0; part < kRowParts; ++part) {
          const uint32_t bytes = args.part_bytes[part];
          if (bytes > 0) store(args.outputs[part] + row * bytes, done, bytes);
          done += bytes;
        }
      }
    }
  };
  const uint64_t policy = streaming_policy();
  const auto put = [&](const RowPiece& piece, uint32_t buffer) {
    for_outputs(piece, [&](char* to, uint32_t from, uint32_t bytes) { bulk_store(to, buffer + from, bytes, policy); });
  };
  // One load ahead: with two, a call of many rows without norms took longer where ranks share a card.
  BulkMover<RowPiece, decltype(put), 1, kBuffers> mover(buffers, barriers, kBufferBytes, put);
  bool arrived = !round.refused;
  int turn = copier;  // of this warp, in pieces from the row block's first
  for (int row_block = 0; row_block < args.row_blocks; ++row_block) {
    const int step = row_block / TPF_MAX_CTAS, cta = row_block % TPF_MAX_CTAS;
    arrived = arrived && (lane >= world_size || wait_step(args.team, args.call, round, step, cta, lane));
    arrived = __all_sync(0xffffffffu, arrived);
    __syncwarp();
    fence_async_global();
    const int64_t first = int64_t{row_block} * Tiles::kRows;
    const auto bytes_of = [&](int64_t rows) {
      return static_cast<int>(max(int64_t{0}, min(int64_t{Tiles::kRows}, rows - first))) * row_bytes;
    };
    const int pieces = (bytes_of(args.partition.largest()) + piece_bytes - 1) / piece_bytes;
    for (; turn < pieces; turn += copiers) {
      // The peers take turns piece by piece: all ranks are then at about the same rows, and where ranks share a card,
      // its L2 cache answers most of them.
      const int at = turn * piece_bytes;
      for (int offset = 1; offset <= world_size; ++offset) {
        const int source = (args.team.rank + offset) % world_size;
        const Rows rows = args.partition.rows(source);
        const int left = bytes_of(rows.count) - at;
        if (left <= 0) continue;
        const int64_t row = rows.start + first;
        const RowPiece piece = {kNorm ? row + at / row_bytes : row * row_bytes + at,
                                static_cast<uint32_t>(min(piece_bytes, left) - unused)};
        if (arrived) {
          const char* from = slot_of(args.team, source, round.epoch) + first * row_bytes + at + unused;
          mover.move(piece, from, piece.bytes);
          continue;
        }
        for_outputs(piece, [&](char* to, uint32_t, uint32_t size) { poison(to, size, lane, 32); });
      }
    }
    turn -= pieces;
  }
  mover.flush();
}

// A warp that has done its part leaves; the last one waits until all others have.
__device__ inline void leave_block() { asm volatile("bar.arrive 4, %0;" ::"n"(kProjectionThreads) : "memory"); }
__device__ inline void leave_block_last() { asm volatile("bar.sync 4, %0;" ::"n"(kProjectionThreads) : "memory"); }

#endif

template <typename Tiles, typename Out, bool kNorm>
__global__ void __launch_bounds__(kProjectionThreads, 1)
    qkv_a_proj_ag_kernel(const __grid_constant__ ProjectionArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ char unaligned[];
  __shared__ ProjectionShared shared;
  char* stages = unaligned + (1024 - shared_address(unaligned) % 1024) % 1024;
  using Bytes = SharedBytes<Tiles, kNorm>;
  char* buffers = stages + Bytes::kOperands;
  float* scales = reinterpret_cast<float*>(buffers + kCopiers * Bytes::kCopierBytes);
  uint4* norm_weights = reinterpret_cast<uint4*>(scales + Tiles::kScales);
  char* norm_buffers = reinterpret_cast<char*>(norm_weights + kNormVectors * 32);
  if (threadIdx.x == 0) {
    shared.init<Tiles>();
    if (kNorm) shared.taken = 0;
    if (args.partition.rows(args.team.rank).count > 0) prefetch_map(&args.input_map);
    prefetch_map(&args.weight_map);
    if (Tiles::kTail > 0) prefetch_map(&args.tail_map);
  }
  if constexpr (kNorm) keep_norm_weights<Out>(args, norm_weights);
  const BlockRound round = begin_op<false>(args.team, args.call, args.fingerprint, 1);
  // By a shuffle the compiler knows it to be the same in a warp, and keeps the operands' places in uniform registers.
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  if (warp >= kOtherWarps) {
    take_registers<multiply_registers<Tiles>(kNorm)>();
    if (!round.refused) {
      multiply_tiles<Tiles, Out, kNorm>(args, round, shared, (warp - kOtherWarps) / 4, stages, scales);
      if constexpr (kNorm) {
        if (Tiles::kScaled) products_sync();  // all is multiplied: the stages are free
        norm_rows<Tiles, Out>(args, round, shared, norm_weights, stages + (warp - kOtherWarps) * kNormBufferBytes);
      }
    }
    leave_block();
    return;
  }
  give_registers<other_registers<Tiles>(kNorm)>();
  if (warp < kCopiers) {
    const int copier = blockIdx.x * kCopiers + warp;
    char* own = buffers + warp * Bytes::kCopierBytes;
    // Of what is too little for four buffers, two larger ones are best when nothing is left to multiply. While
    // something is, four of less take less time: a load need not wait for the last store, nor operands for a large one.
    // Rows that are normed want the larger.
    constexpr int kBesideProducts = kNorm ? Bytes::kBuffers : Bytes::kMostBuffers;
    if (kBesideProducts != Bytes::kBuffers && first_late_row_block(args) > 0) {
      copy_row_blocks<Tiles, Out, kNorm, kBesideProducts>(args, round, copier, own, shared.copied[warp]);
    } else {
      copy_row_blocks<Tiles, Out, kNorm, Bytes::kBuffers>(args, round, copier, own, shared.copied[warp]);
    }
    if (warp == 0) {
      // Here, and not in code that all warps share: there they cost the products the registers of their pipeline.
      refresh_signals(args.team, round.epoch, threadIdx.x, 32);
      leave_block_last();
      round.refused ? end_faulted_op(args.team, args.call, round) : end_op(args.team);
      return;
    }
  } else if (!round.refused && warp == kCopiers) {
    fetch_operands<Tiles>(args, shared, stages, scales);
  } else if (!round.refused) {
    finish_row_blocks<Tiles, Out, kNorm>(args, round, shared, norm_weights, norm_buffers);
  }
  leave_block();
#endif
}

}  // namespace tpf
