// The epilogue of a projection on sm_90: a finished tile's accumulators get their bias, are rounded, and leave through
// the stage that was multiplied last, as whole rows.
#pragma once
#include <algorithm>
#include <bit>
#include <type_traits>

#include "../kernels/qkv_a_proj_ag.cuh"

namespace tpf {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// run(std::integral_constant) for kFirst, kFirst + kStep, ... below kEnd.
template <int kFirst, int kEnd, int kStep, typename Run>
__device__ inline void for_constants(const Run& run) {
  if constexpr (kFirst < kEnd) {
    run(std::integral_constant<int, kFirst>{});
    for_constants<kFirst + kStep, kEnd, kStep>(run);
  }
}

// The bias of kColumns columns, of which `columns` are there, to the accumulators from the kFirst'th on.
template <int kFirst, int kColumns, typename Out, int kAccumulators>
__device__ inline void add_bias(const Out* bias, int columns, float (&accumulators)[kAccumulators]) {
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j) {
    const int column = j * 8 + threadIdx.x % 4 * 2;
    if (column >= columns) break;
    const float left = static_cast<float>(bias[column]), right = static_cast<float>(bias[column + 1]);
    float* to = accumulators + kFirst + 4 * j;
    to[0] += left, to[1] += right;
    to[2] += left, to[3] += right;
  }
}

// Rounds a warp's 16 rows of accumulators, kColumns columns from the kFirst'th sum on, to where `to` points. `rows`
// rows and `columns` columns are there from that point on. Through `staged` in shared memory, for whole rows to be
// written at once.
template <int kFirst, int kColumns, typename Out, int kAccumulators>
__device__ inline void store_accumulators(const ProjectionArgs& args, Out* to, int64_t rows, int columns, Out* staged,
                                          const float (&accumulators)[kAccumulators], bool last) {
  constexpr int kPitch = staged_pitch(kColumns), kVectors = kColumns / 8;
  constexpr int kLanesOfRow = std::max(2u, std::bit_ceil(unsigned{kVectors}));
  const int lane = threadIdx.x % 32;
  // Of a pair of 8-column matrices lanes 0 to 15 point to the rows of the left one, the others to those of the right.
  Out* const pair = staged + lane % 16 * kPitch + lane / 16 * 8;
#pragma unroll
  for (int column = 0; column < kColumns; column += 16) {
    const float* sum = accumulators + kFirst + column / 2;
    const uint32_t upper = pack2(sum[0], sum[1], Out{}), lower = pack2(sum[2], sum[3], Out{});
    if (column + 8 < kColumns) {
      store_matrices(pair + column, {upper, lower, pack2(sum[4], sum[5], Out{}), pack2(sum[6], sum[7], Out{})});
    } else {
      store_matrices(pair + column, {upper, lower});
    }
  }
  // After the last of a tile TMA writes there. Behind the stores below the fence would wait for them.
  if (last) fence_async_shared();
  __syncwarp();
  const int vector = lane % kLanesOfRow;
  if (vector < kVectors && vector * 8 < columns) {
#pragma unroll
    for (int first = 0; first < 16; first += 32 / kLanesOfRow) {
      const int row = first + lane / kLanesOfRow;
      const uint4 raw = *reinterpret_cast<const uint4*>(staged + row * kPitch + vector * 8);
      if (row < rows) store16(to + int64_t{row} * args.call.columns + vector * 8, raw);
    }
  }
  __syncwarp();
}

// Writes a warp group's part of a finished tile, through the stage that was multiplied last.
template <typename Tiles, typename Out, bool kNorm>
__device__ inline void store_tile(const ProjectionArgs& args, const BlockRound& round, Tile tile, GroupPart part,
                                  char* stage, float (&accumulators)[Tiles::kMTiles][Tiles::kAccumulators]) {
  const int warp = threadIdx.x / 32 - kOtherWarps;
  Out* const staged = reinterpret_cast<Out*>(stage + warp * Tiles::kStagedBytes);
  const int64_t row = int64_t{tile.row_block} * Tiles::kRows + part.row + warp % 4 * 16;
  const int64_t rows = args.partition.rows(args.team.rank).count;
  products_sync();
#pragma unroll
  for (int m_tile = 0; m_tile < Tiles::kMTiles; ++m_tile) {
    const int64_t first_row = row + m_tile * 64;
    for_constants<0, Tiles::kGroupColumns, Tiles::kStagedColumns>([&](auto first) {
      constexpr int kFirst = decltype(first)::value;
      constexpr int kColumns = std::min(Tiles::kStagedColumns, Tiles::kGroupColumns - kFirst);
      const int column = column_of<Tiles>(args, tile.column_tile, part.column + kFirst);
      const int left = args.call.columns - column;
      if (args.bias != nullptr) {
        add_bias<kFirst / 2, kColumns>(static_cast<const Out*>(args.bias) + column, left, accumulators[m_tile]);
      }
      Out* const to = rows_at<Out, kNorm>(args, round) + first_row * args.call.columns + column;
      const bool last = m_tile + 1 == Tiles::kMTiles && kFirst + kColumns == Tiles::kGroupColumns;
      store_accumulators<kFirst / 2, kColumns>(args, to, rows - first_row, left, staged, accumulators[m_tile], last);
    });
  }
}

#endif

}  // namespace tpf
