// qkv_a_proj_ag_kernel, and its copying warps.
#pragma once
#include "qkv_a_proj_ag_multiply.cuh"

namespace tpf {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// What a copying warp moves at once. Without norms a run of bytes of the latent, `at` its first; with norms some whole
// rows, `at` the first of them.
struct RowPiece {
  int64_t at;
  uint32_t bytes;
};

// Copies finished rows of all ranks to the outputs. Pieces of a row block go round the grid's copying warps.
template <typename Out, bool kNorm>
__device__ inline void copy_row_blocks(const ProjectionArgs& args, const BlockRound& round, int copier, char* buffers,
                                       uint64_t* barriers) {
  const int lane = threadIdx.x % 32, world_size = args.team.world_size, copiers = gridDim.x * kCopiers;
  const int row_bytes = args.call.columns * sizeof(Out);
  const int piece_bytes = kNorm ? kCopierBytes / row_bytes * row_bytes : kCopierBytes;
  // store(where a piece of an output lies, the same in the piece of rows, bytes) for all there are
  const auto for_outputs = [&](const RowPiece& piece, auto&& store) {
    if constexpr (!kNorm) {
      store(args.outputs[0] + piece.at, 0, piece.bytes);
    } else {
      uint32_t done = 0;
      for (int64_t row = piece.at; done < piece.bytes; ++row) {
        for (int part = 0; part < 3; ++part) {
          const uint32_t bytes = args.columns[part] * sizeof(Out);
          if (bytes > 0) store(args.outputs[part] + row * bytes, done, bytes);
          done += bytes;
        }
      }
    }
  };
  const auto put = [&](const RowPiece& piece, const char* buffer) {
    for_outputs(piece, [&](char* to, uint32_t from, uint32_t bytes) { bulk_store(to, buffer + from, bytes); });
  };
  BulkMover<RowPiece, decltype(put)> mover(buffers, barriers, kCopierBytes, put);
  // Every peer's first word before the first piece: a peer that calls something else may have put its rows where the
  // others' latents are looked for.
  bool arrived = !round.refused && (lane >= world_size || wait_step(args.team, args.call, round, 0, 0, lane));
  arrived = __all_sync(0xffffffffu, arrived);
  int turn = copier;  // of this warp, in pieces from the row block's first
  for (int row_block = 0; row_block < args.row_blocks; ++row_block) {
    for (int offset = 1; offset <= world_size; ++offset) {
      const int source = (args.team.rank + offset) % world_size;
      if (lane == 0 && arrived) {
        arrived = wait_step(args.team, args.call, round, row_block / TPF_MAX_CTAS, row_block % TPF_MAX_CTAS, source);
        fence_async_global();
      }
      arrived = __shfl_sync(0xffffffffu, arrived, 0);
      const Rows rows = args.partition.rows(source);
      const int64_t first = int64_t{row_block} * kTileRows;
      const int bytes = static_cast<int>(max(int64_t{0}, min(int64_t{kTileRows}, rows.count - first))) * row_bytes;
      const char* from = slot(args.team.region[source], round.epoch, args.team.slot_bytes) + first * row_bytes;
      const int pieces = (bytes + piece_bytes - 1) / piece_bytes;
      for (; turn < pieces; turn += copiers) {
        const int at = turn * piece_bytes;
        const int64_t row = rows.start + first;
        const RowPiece piece = {kNorm ? row + turn * (piece_bytes / row_bytes) : row * row_bytes + at,
                                static_cast<uint32_t>(min(piece_bytes, bytes - at))};
        if (arrived) {
          if (lane == 0) mover.move(piece, from + at, piece.bytes);
          continue;
        }
        // A number that could be taken for a result is not left.
        for_outputs(piece, [&](char* to, uint32_t, uint32_t size) {
          for (uint32_t byte = lane * 16; byte < size; byte += 512) store16(to + byte, {~0u, ~0u, ~0u, ~0u});
        });
      }
      turn -= pieces;
    }
  }
  if (lane == 0) mover.flush();
}

#endif

template <typename In, typename Out, bool kNorm>
__global__ void __launch_bounds__(kProjectionThreads, 1)
    qkv_a_proj_ag_kernel(const __grid_constant__ ProjectionArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ char unaligned[];
  __shared__ ProjectionShared shared;
  char* stages = unaligned + (1024 - shared_address(unaligned) % 1024) % 1024;
  char* buffers = stages + kProductStages * kProductStageBytes;
  if (threadIdx.x == 0) shared.init();
  const BlockRound round = begin_op(args.team, args.call, args.contract, 1);
  if (threadIdx.x >= 128) {
    take_registers<216>();
    if (!round.refused) multiply_tiles<In, Out, kNorm>(args, round, shared, stages);
    return;
  }
  give_registers<72>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp < kCopiers) {
    copy_row_blocks<Out, kNorm>(args, round, blockIdx.x * kCopiers + warp,
                                buffers + warp * kCopierStages * kCopierBytes, shared.copied[warp]);
  } else if (warp == kCopiers && lane == 0 && !round.refused) {
    fetch_operands<In>(args, shared, stages);
  } else if (warp > kCopiers && !round.refused) {
    // Row blocks that this rank has no rows for: the peers wait for as many from everyone.
    const int64_t rows = args.partition.rows(args.team.rank).count;
    for (int row_block = blockIdx.x; row_block < args.row_blocks; row_block += gridDim.x) {
      if (int64_t{row_block} * kTileRows >= rows) publish_row_block(args, round, row_block, lane);
    }
  }
#endif
}

}  // namespace tpf
