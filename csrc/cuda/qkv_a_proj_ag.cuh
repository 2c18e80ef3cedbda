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

struct StagePosition {
  __device__ void advance() {
    if (++stage == kProductStages) stage = 0, ++round;
  }
  int stage = 0;
  uint32_t round = 0;
};

// run(tile) for every tile of this block that has rows.
template <typename Run>
__device__ inline void for_tiles(const ProjectionArgs& args, Run&& run) {
  const int64_t rows = args.partition.rows(args.team.rank).count;
  for (int index = blockIdx.x; index < args.row_blocks * args.column_tiles; index += gridDim.x) {
    const Tile tile = tile_of(index, args);
    if (int64_t{tile.row_block} * kTileRows < rows) run(tile);
  }
}

template <typename In>
__device__ inline void fetch_operands(const ProjectionArgs& args, ProjectionShared& shared, char* stages) {
  constexpr int kElements = kSwizzleBytes / sizeof(In);
  if (args.partition.rows(args.team.rank).count > 0) prefetch_map(&args.input_map);
  prefetch_map(&args.weight_map);
  StagePosition at;
  for_tiles(args, [&](Tile tile) {
    for (int k = 0; k < args.k_blocks; ++k) {
      if (at.round > 0) barrier_wait(&shared.empty[at.stage], (at.round - 1) & 1);
      char* stage = stages + at.stage * kProductStageBytes;
      uint64_t* full = &shared.full[at.stage];
      barrier_expect(full, kProductStageBytes);
      tensor_load(stage, &args.input_map, k * kElements, tile.row_block * kTileRows, full);
      tensor_load(stage + kTileRows * kSwizzleBytes, &args.weight_map, k * kElements, tile.column_tile * kTileColumns,
                  full);
      at.advance();
    }
  });
}

// Where a warp group's operands lie in a stage.
struct Operands {
  uint32_t a, b;
};

__device__ inline Operands operands_of(uint32_t stages, int stage, int group) {
  const uint32_t at = stages + stage * kProductStageBytes;
  return {at + group * kTileRows / 2 * kSwizzleBytes, at + kTileRows * kSwizzleBytes};
}

// A warp group's half of a tile, products of 16-bit operands: one product stays in flight.
template <typename In>
__device__ inline void multiply_tile(const ProjectionArgs& args, ProjectionShared& shared, uint32_t stages, int group,
                                     StagePosition& at, float (&sums)[kSums]) {
  const bool leads = threadIdx.x % 32 == 0;
  int last = 0;
#pragma unroll
  for (float& sum : sums) sum = 0;
  hold(sums);
  for (int k = 0; k < args.k_blocks; ++k) {
    barrier_wait(&shared.full[at.stage], at.round & 1);
    const Operands from = operands_of(stages, at.stage, group);
    product_fence();
#pragma unroll
    for (int byte = 0; byte < kSwizzleBytes; byte += 32) {
      multiply(sums, operand(from.a, byte), operand(from.b, byte), true, In{});
    }
    product_commit();
    product_wait<1>();
    if (k > 0 && leads) barrier_arrive(&shared.empty[last]);
    last = at.stage;
    at.advance();
  }
  product_wait<0>();
  hold(sums);
  if (leads) barrier_arrive(&shared.empty[last]);
}

// The row that this thread's first sums belong to; the others' lies 8 below.
__device__ inline int64_t row_of(Tile tile, int group) {
  return int64_t{tile.row_block} * kTileRows + group * kTileRows / 2 + threadIdx.x % 128 / 32 * 16 +
         threadIdx.x % 32 / 4;
}

// The same of e4m3 operands with their scales. The other warp group multiplies while this one promotes.
__device__ inline void multiply_scaled_tile(const ProjectionArgs& args, ProjectionShared& shared, uint32_t stages,
                                            int group, StagePosition& at, Tile tile, float (&sums)[kSums]) {
  const bool leads = threadIdx.x % 32 == 0;
  const int64_t rows = args.partition.rows(args.team.rank).count, row = row_of(tile, group);
  const float* upper = args.scale + min(row, rows - 1) * args.scale_row_stride;
  const float* lower = args.scale + min(row + 8, rows - 1) * args.scale_row_stride;
  // 192 columns lie in two blocks of 128: the first ends after 64 or 128 of them.
  const int first_block = tile.column_tile * kTileColumns / 128, blocks = (args.call.columns + 127) / 128;
  const float* left = args.weight_scale + int64_t{first_block} * args.k_blocks;
  const float* right = args.weight_scale + int64_t{min(first_block + 1, blocks - 1)} * args.k_blocks;
  const bool early = tile.column_tile * kTileColumns % 128 != 0;
  float next[4] = {__ldg(upper), __ldg(lower), __ldg(left), __ldg(right)};
#pragma unroll
  for (int i = 0; i < kSums; ++i) sums[i] = 0;
  for (int k = 0; k < args.k_blocks; ++k) {
    float part[kSums];
    barrier_wait(&shared.full[at.stage], at.round & 1);
    const Operands from = operands_of(stages, at.stage, group);
    hold(part);
    product_fence();
#pragma unroll
    for (int byte = 0; byte < kSwizzleBytes; byte += 32) {
      multiply(part, operand(from.a, byte), operand(from.b, byte), byte > 0, __nv_fp8_e4m3{});
    }
    product_commit();
    const float scales[4] = {next[0] * next[2], next[0] * next[3], next[1] * next[2], next[1] * next[3]};
    if (k + 1 < args.k_blocks) {
      upper += args.scale_group_stride, lower += args.scale_group_stride;
      next[0] = __ldg(upper), next[1] = __ldg(lower), next[2] = __ldg(++left), next[3] = __ldg(++right);
    }
    product_wait<0>();
    hold(part);
    if (leads) barrier_arrive(&shared.empty[at.stage]);
    at.advance();
#pragma unroll
    for (int j = 0; j < kTileColumns / 8; ++j) {
      const bool is_left = j < 8 || (j < 16 && !early);
      const float high = is_left ? scales[0] : scales[1], low = is_left ? scales[2] : scales[3];
      sums[4 * j] = fmaf(part[4 * j], high, sums[4 * j]);
      sums[4 * j + 1] = fmaf(part[4 * j + 1], high, sums[4 * j + 1]);
      sums[4 * j + 2] = fmaf(part[4 * j + 2], low, sums[4 * j + 2]);
      sums[4 * j + 3] = fmaf(part[4 * j + 3], low, sums[4 * j + 3]);
    }
  }
}

// Rounds a warp group's half of a finished tile into this rank's slot.
template <typename Out>
__device__ inline void store_sums(const ProjectionArgs& args, Out* slot_rows, int64_t row, Tile tile,
                                  const float (&sums)[kSums]) {
  const int columns = args.call.columns, lane = threadIdx.x % 32;
  const int64_t rows = args.partition.rows(args.team.rank).count;
  Out* to = slot_rows + row * columns;
#pragma unroll
  for (int j = 0; j < kSums / 4; ++j) {
    const int column = tile.column_tile * kTileColumns + j * 8 + lane % 4 * 2;
    if (column >= columns) break;
    float bias[2] = {};
    if (args.bias != nullptr) {
      bias[0] = static_cast<float>(static_cast<const Out*>(args.bias)[column]);
      bias[1] = static_cast<float>(static_cast<const Out*>(args.bias)[column + 1]);
    }
    uint32_t* upper = reinterpret_cast<uint32_t*>(to + column);
    uint32_t* lower = reinterpret_cast<uint32_t*>(to + int64_t{8} * columns + column);
    if (row < rows) *upper = pack2(sums[4 * j] + bias[0], sums[4 * j + 1] + bias[1], Out{});
    if (row + 8 < rows) *lower = pack2(sums[4 * j + 2] + bias[0], sums[4 * j + 3] + bias[1], Out{});
  }
}

// The two latent norms of a finished row block, in the slot; k_pe stays as it is. A warp takes a few rows at a time:
// it waits for the L2 once for all of them.
template <typename Out>
__device__ inline void norm_rows(const ProjectionArgs& args, Out* slot_rows, int row_block) {
  constexpr int kRows = 2, kWarps = 8;
  const int64_t begin = int64_t{row_block} * kTileRows;
  const int64_t end = min(begin + kTileRows, args.partition.rows(args.team.rank).count);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 - 4;
  for (int64_t first = begin + warp * kRows; first < end; first += kWarps * kRows) {
    Out* at = slot_rows + first * args.call.columns;
#pragma unroll 1
    for (int part = 0; part < 2; ++part) {
      const int columns = static_cast<int>(args.columns[part]);
      const auto inside = [&](int i, int v) { return first + i < end && (v * 32 + lane) * 8 < columns; };
      const auto vector = [&](int i, int v) { return at + int64_t{i} * args.call.columns + (v * 32 + lane) * 8; };
      uint4 raw[kRows][kNormVectors];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int v = 0; v < kNormVectors; ++v) raw[i][v] = inside(i, v) ? load16(vector(i, v)) : uint4{};
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        float squares = 0, values[8], scaled[8];
#pragma unroll
        for (int v = 0; v < kNormVectors; ++v) {
          unpack(values, raw[i][v], Out{});
#pragma unroll
          for (int e = 0; e < 8; ++e) squares = fmaf(values[e], values[e], squares);
        }
        const float rstd = __frsqrt_rn(warp_sum(squares) / static_cast<float>(columns) + args.eps);
        const uint4* weight = static_cast<const uint4*>(args.norm_weights[part]) + lane;
#pragma unroll
        for (int v = 0; v < kNormVectors; ++v) {
          if (!inside(i, v)) continue;
          unpack(values, raw[i][v], Out{});
          unpack(scaled, __ldg(weight + v * 32), Out{});
#pragma unroll
          for (int e = 0; e < 8; ++e) scaled[e] *= values[e] * rstd;
          store16(vector(i, v), pack(scaled, Out{}));
        }
      }
      at += columns;
    }
  }
}

__device__ inline void products_sync() { asm volatile("bar.sync 1, 256;" ::: "memory"); }

// To all peers, and to this rank's own copying warps: one lane each.
__device__ inline void publish_row_block(const ProjectionArgs& args, const BlockRound& round, int row_block, int lane) {
  if (lane >= args.team.world_size) return;
  publish_step(args.team, round, row_block / TPF_MAX_CTAS, row_block % TPF_MAX_CTAS, lane);
}

template <typename In, typename Out, bool kNorm>
__device__ inline void multiply_tiles(const ProjectionArgs& args, const BlockRound& round, ProjectionShared& shared,
                                      char* stages) {
  const int group = threadIdx.x / 128 - 1;
  Out* slot_rows = reinterpret_cast<Out*>(slot(args.team.region[args.team.rank], round.epoch, args.team.slot_bytes));
  uint32_t* finished = control(args.team.region[args.team.rank])->finished;
  StagePosition at;
  for_tiles(args, [&](Tile tile) {
    float sums[kSums];
    if constexpr (sizeof(In) == 1) {
      multiply_scaled_tile(args, shared, shared_address(stages), group, at, tile, sums);
    } else {
      multiply_tile<In>(args, shared, shared_address(stages), group, at, sums);
    }
    store_sums<Out>(args, slot_rows, row_of(tile, group), tile, sums);
    products_sync();
    if (threadIdx.x == 128) {
      cuda::atomic_ref<uint32_t, cuda::thread_scope_device> count(finished[tile.row_block]);
      shared.last = count.fetch_add(1, cuda::memory_order_acq_rel) + 1 == args.column_tiles;
      if (shared.last) count.store(0, cuda::memory_order_relaxed);
    }
    products_sync();
    if (!shared.last) return;
    if constexpr (kNorm) {
      norm_rows<Out>(args, slot_rows, tile.row_block);
      products_sync();
    }
    if (threadIdx.x < 160) publish_row_block(args, round, tile.row_block, threadIdx.x - 128);
  });
}

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
