// qkv_a_proj_ag_kernel: the projection of this rank's rows, gathered by all ranks while later rows are still
// multiplied.
//
// The grid's blocks share out tiles of 128 rows by 192 columns. In a block one warp fetches operands into a ring of
// shared-memory stages, two warp groups multiply (64 rows each) and write finished tiles into this rank's own slot, and
// two warps copy finished rows from the peers' slots to the output with the copy engine. Whoever finishes the last tile
// of a row block publishes it: row block i has signal i of the round, the same number of them on all ranks. In
// qkv_a_proj_ag_norm the owner normalises the row block first, in its slot: once, and not on every rank.
//
// A row's result is one chain of additions over K: it depends on nothing but the row. fp8 operands are multiplied in
// blocks of 128 along K, each promoted to fp32 with its scales (DeepSeek-V3, section 3.3).
#pragma once
#include "gemm.cuh"
#include "signal.cuh"

namespace tpf {

constexpr int kTileRows = 128;
constexpr int kTileColumns = 192;        // column counts in use are multiples of 64 and not of 128; 2112 is 11 x 192
constexpr int kSums = kTileColumns / 2;  // that a thread holds of 64 rows
constexpr int kProductStages = 4;
constexpr int kProductStageBytes = (kTileRows + kTileColumns) * kSwizzleBytes;
constexpr int kCopiers = 2;         // warps of a block
constexpr int kCopierBytes = 8192;  // of a buffer
// With room to begin at a multiple of 1024, as the swizzle's pattern wants it.
constexpr int kProjectionShared = 1024 + kProductStages * kProductStageBytes + kCopiers * kCopierStages * kCopierBytes;
constexpr int kGroupedRowBlocks = 4;  // whose tiles are neighbours in the order: they share operands in the L2
constexpr int kProjectionThreads = 384;
constexpr int kNormVectors = 8;  // of a lane, in the longer of the two normed parts of a row
constexpr int kNormColumns = kNormVectors * 256;

struct ProjectionArgs {
  CUtensorMap input_map, weight_map;
  char* outputs[3];     // latent; or q_a, kv_a, k_pe
  uint32_t columns[3];  // of each; 0 where there is none
  const float* scale;
  int64_t scale_row_stride, scale_group_stride;
  const float* weight_scale;
  const void* bias;
  const void* norm_weights[2];
  float eps;
  tpf_team team;
  tpf_call call;
  uint32_t contract;
  Partition partition;
  int32_t row_blocks;  // of the rank that owns most rows; at least 1
  int32_t column_tiles;
  int32_t k_blocks;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

struct ProjectionShared {
  alignas(8) uint64_t full[kProductStages];
  alignas(8) uint64_t empty[kProductStages];
  alignas(8) uint64_t copied[kCopiers][kCopierStages];
  int last;

  // By one thread; a barrier of the block follows.
  __device__ void init() {
    for (int stage = 0; stage < kProductStages; ++stage) {
      barrier_init(&full[stage], 1);
      barrier_init(&empty[stage], 8);  // warps that multiply
    }
    for (auto& buffers : copied) {
      for (uint64_t& barrier : buffers) barrier_init(&barrier, 1);
    }
    fence_async_shared();
  }
};

struct Tile {
  int row_block, column_tile;
};

// Tiles in the order in which blocks take them: a few row blocks at a time, all columns of these.
__device__ inline Tile tile_of(int index, const ProjectionArgs& args) {
  const int group_tiles = kGroupedRowBlocks * args.column_tiles;
  const int group = index / group_tiles, at = index % group_tiles;
  const int row_blocks = min(kGroupedRowBlocks, args.row_blocks - group * kGroupedRowBlocks);
  return {group * kGroupedRowBlocks + at % row_blocks, at / row_blocks};
}

// run(tile) for every tile of this block that has rows.
template <typename Run>
__device__ inline void for_tiles(const ProjectionArgs& args, Run&& run) {
  const int64_t rows = args.partition.rows(args.team.rank).count;
  for (int index = blockIdx.x; index < args.row_blocks * args.column_tiles; index += gridDim.x) {
    const Tile tile = tile_of(index, args);
    if (int64_t{tile.row_block} * kTileRows < rows) run(tile);
  }
}

// To all peers, and to this rank's own copying warps: one lane each.
__device__ inline void publish_row_block(const ProjectionArgs& args, const BlockRound& round, int row_block, int lane) {
  if (lane >= args.team.world_size) return;
  publish_step(args.team, round, row_block / TPF_MAX_CTAS, row_block % TPF_MAX_CTAS, lane);
}

#endif

}  // namespace tpf
