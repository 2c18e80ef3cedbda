// qkv_a_proj_ag_kernel: the projection of this rank's rows, gathered by all ranks while later rows are still
// multiplied.
//
// The grid's blocks share out tiles (see Tiling). In a block one warp fetches operands, and the scales of fp8, into a
// ring of shared-memory stages, and two warp groups multiply and write finished tiles into this rank's own slot. One
// warp counts finished tiles: whoever counts the last one of a row block publishes it. Row block i has signal i of the
// round, the same number of them on all ranks. Two warps copy finished rows from the peers' slots to the output with
// the copy engine. In qkv_a_proj_ag_norm a finished row block is normalised first, in its slot: once, at its owner, and
// not on every rank. The counting warps of all blocks do it while others multiply and, at the end, the warps that have
// multiplied.
//
// A row's result is one chain of additions over K, in whatever tile it lies: it depends on nothing but the row. fp8
// operands are multiplied in blocks of 128 along K, each promoted to fp32 with its scales (DeepSeek-V3, section 3.3).
#pragma once
#include <numeric>

#include "gemm.cuh"
#include "launch.cuh"
#include "signal.cuh"

namespace tpf {

constexpr int kProductWarps = 8, kOtherWarps = 4;  // of a block, the others before them

// Of rows of so many 16-bit elements in shared memory: an odd number of vectors of 16 bytes, for eight rows of them to
// lie in different banks.
constexpr int staged_pitch(int columns) { return (columns / 8 | 1) * 8; }

// How many columns find room for 16 rows.
constexpr int most_staged(int bytes) {
  int columns = 8;
  while (staged_pitch(columns + 8) * 32 <= bytes) columns += 8;
  return columns;
}

// Columns in as few parts as there can be of at most so many, alike and of whole patterns of 8.
constexpr int divided(int columns, int most) {
  int parts = 1;
  while (columns % (8 * parts) != 0 || columns / parts > most) ++parts;
  return columns / parts;
}

// A block's tile, and its two warp groups' shares of it: half of the rows each or, where rows are few, half of the
// columns. Column counts in use are multiples of 64 and not of 128.
template <typename Input, int kTileRows, int kTileColumns, int kTileStages>
struct Tiling {
  using In = Input;
  static constexpr int kRows = kTileRows, kColumns = kTileColumns, kStages = kTileStages;
  static constexpr bool kByRows = kRows >= 128;
  static constexpr int kGroupRows = kByRows ? kRows / 2 : kRows;
  static constexpr int kGroupColumns = kByRows ? kColumns : kColumns / 2;
  static constexpr int kParts = kGroupRows / 64;   // a product has 64 rows
  static constexpr int kSums = kGroupColumns / 2;  // that a thread holds of a part
  static constexpr int kStageBytes = (kRows + kColumns) * kSwizzleBytes;
  static constexpr bool kScaled = sizeof(In) == 1;
  // Where columns have scales, 128 have one, and no tile's are more than 256 that follow one another: what a tile has
  // beyond that lies behind all tiles' runs. So 264 columns have three scales, whichever tile it is.
  static constexpr int kRun = kScaled ? std::min(kColumns, 256) : kColumns, kSpare = kColumns - kRun;
  static_assert(kSpare == 0 || (kByRows && 128 % kSpare == 0));  // so that the spare ones have one scale
  static constexpr int kWeightBox = divided(kRun, 256);  // rows of the weight that are fetched at once: at most so many
  // Whether one warp group promotes while the other multiplies. It costs the way from one to the other each time, which
  // is little where the products themselves wait longest for their beginning and their end.
  static constexpr bool kInTurns = kScaled && kColumns <= 64;
  // Scales, each for 128 of K: of the tile's rows, and of its columns. A tile may begin among 128 columns that have the
  // same: these are columns that surely have.
  static constexpr int kScaledColumns = std::gcd(kRun, 128);
  static constexpr int kColumnScales = (kColumns + kScaledColumns - 1) / kScaledColumns;
  // Those of four blocks of K lie together. When the first of the four is fetched, all but kStages - 1 blocks of K
  // before it have been multiplied: so many fours are kept that those stages' scales are not overwritten.
  static constexpr int kScaleFours = (kStages + 3 + 3) / 4;
  static constexpr int kScales = kScaled ? kScaleFours * 4 * (kRows + kColumnScales) : 0;
  // A finished tile leaves through the stage that was multiplied last, of which each warp has a share: 16 rows at a
  // time of so many columns.
  static constexpr int kStagedBytes = kStageBytes / kProductWarps;
  static constexpr int kStagedColumns = divided(std::min(kGroupColumns, kRun), most_staged(kStagedBytes));
  static_assert(kStagedBytes % 16 == 0);
};
// Many rows. The larger a tile, the fewer operands are read; the largest one's sums just find room in registers. The
// wide one reads more and has a stage more of it on its way, at the copying warps' expense: it takes as little time,
// and less where it needs fewer turns. fp8 sums are held twice until they are promoted: of a wide
// tile a product at a time.
template <typename In>
using LargeTiles = Tiling<In, 256, 176, 3>;
template <typename In>
using LargeNarrowTiles = Tiling<In, 256, 144, 3>;
template <typename In>
using WideTiles = Tiling<In, 128, 264, sizeof(In) == 2 ? 4 : 3>;
template <typename In>
using HalfLargeTiles = Tiling<In, 128, 176, 4>;
template <typename In>
using MediumTiles = Tiling<In, 128, 192, 4>;
template <typename In>
using MediumNarrowTiles = Tiling<In, 128, 144, 4>;
template <typename In>
using SmallTiles = Tiling<In, 128, 96, 5>;
// Few rows of fp8: as many tiles as there are blocks on a card.
template <typename In>
using NarrowTiles = Tiling<In, 128, 64, 6>;
// Few rows: the weight has to come from memory, through as many blocks as there are, with enough of it on its way.
template <typename In>
using FewRows = Tiling<In, 64, 144, 6>;
template <typename In>
using FewRowsManyBlocks = Tiling<In, 64, 16, 14>;

constexpr int kMaxProductStages = 14;
constexpr int kCopiers = 2;    // of the other warps
constexpr int kNormedRun = 4;  // rows that a counting warp norms one after the other: it looks and counts for all
constexpr int kGrouped = 4;    // row blocks whose tiles are neighbours in the order: they share operands in the L2
constexpr int kProjectionThreads = 32 * (kProductWarps + kOtherWarps);
constexpr int kQVectors = 8, kKvVectors = 3;  // of a lane, in the two normed parts of a row
// A block's shared memory. What the operands leave, the copying warps share: more or larger buffers are no gain. Beside
// the three stages of wide fp8 tiles smaller ones are: an operand waits behind what is being copied.
template <typename Tiles, bool kNorm>
struct SharedBytes {
  static constexpr int kMost = 232448 - kStaticSharedBytes;  // sm_90
  static constexpr int kOperands = Tiles::kStages * Tiles::kStageBytes;
  static constexpr int kOthers = 1024  // for the stages to begin at a multiple of it, as the swizzle's pattern wants
                                 + kOperands + Tiles::kScales * int{sizeof(float)} +
                                 (kNorm ? (kQVectors + kKvVectors) * 32 * int{sizeof(uint4)} : 0);
  static constexpr int kMostBuffers = kCopierStages, kMostBufferBytes = Tiles::kSpare > 0 ? 6144 : 7168;
  static constexpr int kLeft = (kMost - kOthers) / kCopiers / 16 * 16;
  static constexpr int kCopierBytes = std::min(kMostBuffers * kMostBufferBytes, kLeft);
  static constexpr int kBuffers = kCopierBytes == kMostBuffers * kMostBufferBytes ? kMostBuffers : 2;
  static constexpr int kAll = kOthers + kCopiers * kCopierBytes;
  static constexpr int buffer_bytes(int buffers) { return kCopierBytes / buffers / 16 * 16; }
};
// Registers of a thread that multiplies, and of the others. They share what the kernel is launched with: 384 times 168.
template <typename Tiles>
constexpr int multiply_registers(bool norm) {
  return Tiles::kParts * Tiles::kSums > 144 ? (norm ? 208 : 216) : Tiles::kScaled ? 216 : 184;
}
template <typename Tiles>
constexpr int other_registers(bool norm) {
  return 504 - 2 * multiply_registers<Tiles>(norm);
}

struct ProjectionArgs {
  CUtensorMap input_map, weight_map, spare_map;  // spare_map: the weight in boxes of the tiles' spare columns
  char* outputs[3];                              // latent; or q_a, kv_a, k_pe
  uint32_t columns[3];                           // of each; 0 where there is none
  const float* scale;
  int64_t scale_row_stride, scale_group_stride;
  const float* weight_scale;
  bool fours_of_scales;  // of a row, and of a column, lie together at a multiple of 16 bytes
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
  uint32_t stored;  // warps' shares of tiles, since the kernel began

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
  __device__ bool begins_four() const { return at_ % 4 == 0; }
  __device__ void advance() { at_ = at_ + 1 < 4 * Tiles::kScaleFours ? at_ + 1 : 0; }

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
  if (Tiles::kSpare == 0 || column < Tiles::kRun) return column_tile * Tiles::kRun + column;
  return args.column_tiles * Tiles::kRun + column_tile * Tiles::kSpare + column - Tiles::kRun;
}

__device__ inline int own_row_blocks(const ProjectionArgs& args, int tile_rows) {
  return static_cast<int>((args.partition.rows(args.team.rank).count + tile_rows - 1) / tile_rows);
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

// The first row block with a tile in the last turn of tiles. When it and those after it are finished, nothing is
// multiplied any more that their norms could hide behind.
__device__ inline int first_late_row_block(const ProjectionArgs& args) {
  const int last_turn = (args.row_blocks * args.column_tiles - 1) / gridDim.x * gridDim.x;
  return last_turn / (kGrouped * args.column_tiles) * kGrouped;
}

// Whether finished tiles are the output: there is nobody to copy them.
template <bool kNorm>
__device__ inline bool is_output(const ProjectionArgs& args) {
  return !kNorm && args.team.world_size == 1;
}

// Where finished tiles are put.
template <typename Out, bool kNorm>
__device__ inline Out* rows_at(const ProjectionArgs& args, const BlockRound& round) {
  return reinterpret_cast<Out*>(is_output<kNorm>(args)
                                    ? args.outputs[0]
                                    : slot(args.team.region[args.team.rank], round.epoch, args.team.slot_bytes));
}

// To all peers, and to this rank's own copying warps: one lane each.
__device__ inline void publish_row_block(const ProjectionArgs& args, const BlockRound& round, int row_block, int lane) {
  if (lane >= args.team.world_size) return;
  publish_step(args.team, round, row_block / TPF_MAX_CTAS, row_block % TPF_MAX_CTAS, lane);
}

#endif

}  // namespace tpf
