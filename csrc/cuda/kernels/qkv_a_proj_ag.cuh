// qkv_a_proj_ag_kernel: the projection of this rank's rows, gathered by all ranks while later rows are still
// multiplied.
//
// The grid's blocks share out tiles (see Tiling). In a block one warp fetches operands, and the scales of fp8, into a
// ring of shared-memory stages, and two warp groups multiply and write finished tiles into this rank's own slot. One
// warp counts finished tiles: whoever counts the last one of a row block publishes it. Row block i has signal i of the
// round, the same number of them on all ranks. Two warps copy finished rows from the peers' slots to the output with
// TMA. In the forms that norm, a finished row block is normalised first, in its slot: once, at its owner, and not on
// every rank, and q_a quantised, if it is to be. The counting warps of all blocks do it while others multiply and, at
// the end, the warps that have multiplied.
//
// A row's result is one chain of additions over K, in whatever tile it lies: it depends on nothing but the row. fp8
// operands are multiplied in blocks of 128 along K, each promoted to fp32 with its scales (DeepSeek-V3, section 3.3).
#pragma once
#include "../../plan/projection.h"
#include "../comm/peers.cuh"
#include "../gemm/wgmma.cuh"

namespace tpf {

template <typename Input, int kTileRows, int kTileColumns, int kTileStages>
struct Tiling : TileShape<sizeof(Input), kTileRows, kTileColumns, kTileStages> {
  using In = Input;
};

template <typename In, TileKind kKind>
using TilesOf =
    Tiling<In, size_of(kKind, sizeof(In)).rows, size_of(kKind, sizeof(In)).columns, size_of(kKind, sizeof(In)).stages>;

constexpr int kRowParts = 4;   // of a gathered row, that are tensors of their own
constexpr int kNormedRun = 4;  // rows that a counting warp norms one after the other: it looks and counts for all

// Registers of a thread that multiplies, and of the others. They share what the kernel is launched with: 384 times 168.
template <typename Tiles>
constexpr int multiply_registers(bool norm) {
  return Tiles::kMTiles * Tiles::kAccumulators > 144 ? (norm ? 208 : 216) : Tiles::kScaled ? 216 : 184;
}
template <typename Tiles>
constexpr int other_registers(bool norm) {
  return 504 - 2 * multiply_registers<Tiles>(norm);
}

// With eight bytes more ptxas no longer pipelines the products of the widest fp8 tile (tests/test_cuda_binary.py).
static_assert(sizeof(tpf_call) == 56);

struct ProjectionArgs {
  CUtensorMap input_map, weight_map, tail_map;  // tail_map: the weight in boxes of the tiles' tail columns
  char* outputs[kRowParts];                     // latent; or q_a, its scales, kv_a, k_pe
  uint32_t part_bytes[kRowParts];               // of a row of each; 0 where there is none
  const float* scale;
  int64_t scale_row_stride, scale_group_stride;
  const float* weight_scale;
  const void* bias;
  const void* norm_weights[2];
  float eps, weight_addend;
  tpf_team team;
  tpf_call call;
  uint32_t fingerprint;
  Partition partition;
  int32_t row_blocks;  // of the rank that owns most rows; at least 1
  int32_t column_tiles;
  int32_t k_blocks;
  bool scale_quads;  // of a row, and of a column, lie together at a multiple of 16 bytes
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Lanes of a multiplying warp that arrive where its stage may be fetched anew: one, for all, behind a __syncwarp. That
// this orders what the others have read, compute-sanitizer's racecheck does not know: for it all of them arrive.
#if defined(TPF_RACECHECK)
constexpr int kArrivingLanes = 32;
#else
constexpr int kArrivingLanes = 1;
#endif

struct ProjectionShared {
  alignas(8) uint64_t full[kMaxProductStages];
  alignas(8) uint64_t empty[kMaxProductStages];
  alignas(8) uint64_t copied[kCopiers][kCopierStages];
  uint32_t stored;  // warps' parts of tiles, since the kernel began
  int32_t taken;    // runs of rows to be normed

  // By one thread; a barrier of the block follows.
  template <typename Tiles>
  __device__ void init() {
    constexpr int kFullArrivals = Tiles::kScaled ? 33 : 1;  // whoever fetches operands, and each lane that does scales
    for (int stage = 0; stage < kMaxProductStages; ++stage) {
      barrier_init(&full[stage], kFullArrivals);
      barrier_init(&empty[stage], kProductWarps * kArrivingLanes);
    }
    for (auto& buffers : copied) {
      for (uint64_t& barrier : buffers) barrier_init(&barrier, 1);
    }
    stored = 0;
    fence_async_shared();
  }
};

template <typename Tiles>
__device__ inline void next_stage(RingPosition& at) {
  if (++at.stage < Tiles::kStages) return;
  at.stage = 0;
  ++at.round;
}

// Where scales are in shared memory: of a block of K, the first row's. The next row's lie four further.
template <typename Tiles>
class ScalePosition {
 public:
  __device__ int first() const { return at_ / 4 * (4 * (Tiles::kRows + Tiles::kColumnScales)) + at_ % 4; }
  __device__ bool begins_quad() const { return at_ % 4 == 0; }
  __device__ void advance() { at_ = at_ + 1 < 4 * Tiles::kScaleQuads ? at_ + 1 : 0; }

 private:
  int at_ = 0;
};

struct Tile {
  int row_block, column_tile;
};

// Tiles in the order in which blocks take them: a few row blocks at a time, all columns of these.
__device__ inline Tile tile_of(int index, const ProjectionArgs& args) {
  const int group = index / (kGrouped * args.column_tiles), at = index % (kGrouped * args.column_tiles);
  const int row_blocks = min(kGrouped, args.row_blocks - group * kGrouped);
  return {group * kGrouped + at % row_blocks, at / row_blocks};
}

// Where a tile's column lies in a row of the output.
template <typename Tiles>
__device__ inline int column_of(const ProjectionArgs& args, int column_tile, int column) {
  if (Tiles::kTail == 0 || column < Tiles::kMainColumns) return column_tile * Tiles::kMainColumns + column;
  return args.column_tiles * Tiles::kMainColumns + column_tile * Tiles::kTail + column - Tiles::kMainColumns;
}

__device__ inline int own_row_blocks(const ProjectionArgs& args, int tile_rows) {
  return static_cast<int>((args.partition.rows(args.team.rank).count + tile_rows - 1) / tile_rows);
}

// A warp group's part of a tile: where it begins in the tile.
struct GroupPart {
  int row, column;
};

template <typename Tiles>
__device__ inline GroupPart part_of(int group) {
  return Tiles::kByRows ? GroupPart{group * Tiles::kGroupRows, 0} : GroupPart{0, group * Tiles::kGroupColumns};
}

// run(tile) for every tile of this block that has rows.
template <typename Tiles, typename Run>
__device__ inline void for_tiles(const ProjectionArgs& args, Run&& run) {
  const int own = own_row_blocks(args, Tiles::kRows);
  for (int index = blockIdx.x; index < args.row_blocks * args.column_tiles; index += gridDim.x) {
    const Tile tile = tile_of(index, args);
    if (tile.row_block < own) run(tile);
  }
}

// The first row block with a tile in the last wave of tiles. When it and those after it are finished, nothing is
// multiplied any more that their copies could hide behind.
__device__ inline int first_late_row_block(const ProjectionArgs& args) {
  const int last_wave = (args.row_blocks * args.column_tiles - 1) / gridDim.x * gridDim.x;
  return last_wave / (kGrouped * args.column_tiles) * kGrouped;
}

// Whether finished tiles are the output: there is nobody to copy them.
template <bool kNorm>
__device__ inline bool is_output(const ProjectionArgs& args) {
  return !kNorm && args.team.world_size == 1;
}

template <bool kNorm>
__device__ inline bool is_q_a_quantized(const ProjectionArgs& args) {
  return kNorm && args.part_bytes[1] > 0;
}

// Bytes of a row in the slot, before those that are gathered. Quantised, q_a takes less of its place, the end.
template <typename Tiles, bool kNorm>
__device__ inline int unused_bytes(const ProjectionArgs& args) {
  if (!Tiles::kScaled || !is_q_a_quantized<kNorm>(args)) return 0;
  return args.call.q_columns * 2 - args.part_bytes[0] - args.part_bytes[1];
}

// Where finished tiles are put.
template <typename Out, bool kNorm>
__device__ inline Out* rows_at(const ProjectionArgs& args, const BlockRound& round) {
  return reinterpret_cast<Out*>(is_output<kNorm>(args) ? args.outputs[0]
                                                       : slot_of(args.team, args.team.rank, round.epoch));
}

// To all peers, and to this rank's own copying warps: one lane each.
__device__ inline void publish_row_block(const ProjectionArgs& args, const BlockRound& round, int row_block, int lane) {
  if (lane >= args.team.world_size) return;
  publish_step(args.team, round, row_block / TPF_MAX_CTAS, row_block % TPF_MAX_CTAS, lane);
}

#endif

}  // namespace tpf
