// qkv_a_proj_ag_kernel's fetching warp and its multiplying warp groups.
#pragma once
#include "qkv_a_proj_ag.cuh"

namespace tpf {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <typename In>
__device__ inline void fetch_operands(const ProjectionArgs& args, ProjectionShared& shared, char* stages) {
  constexpr int kElements = kSwizzleBytes / sizeof(In);
  if (args.partition.rows(args.team.rank).count > 0) prefetch_map(&args.input_map);
  prefetch_map(&args.weight_map);
  RingPosition at;
  for_tiles(args, [&](Tile tile) {
    for (int k = 0; k < args.k_blocks; ++k) {
      if (at.round > 0) barrier_wait(&shared.empty[at.stage], (at.round - 1) & 1);
      char* stage = stages + at.stage * kProductStageBytes;
      uint64_t* full = &shared.full[at.stage];
      barrier_expect(full, kProductStageBytes);
      tensor_load(stage, &args.input_map, k * kElements, tile.row_block * kTileRows, full);
      tensor_load(stage + kTileRows * kSwizzleBytes, &args.weight_map, k * kElements, tile.column_tile * kTileColumns,
                  full);
      at.advance(1, kProductStages);
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
                                     RingPosition& at, float (&sums)[kSums]) {
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
    at.advance(1, kProductStages);
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
                                            int group, RingPosition& at, Tile tile, float (&sums)[kSums]) {
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
    at.advance(1, kProductStages);
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

template <typename In, typename Out, bool kNorm>
__device__ inline void multiply_tiles(const ProjectionArgs& args, const BlockRound& round, ProjectionShared& shared,
                                      char* stages) {
  const int group = threadIdx.x / 128 - 1;
  Out* slot_rows = reinterpret_cast<Out*>(slot(args.team.region[args.team.rank], round.epoch, args.team.slot_bytes));
  uint32_t* finished = control(args.team.region[args.team.rank])->finished;
  RingPosition at;
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

#endif

}  // namespace tpf
