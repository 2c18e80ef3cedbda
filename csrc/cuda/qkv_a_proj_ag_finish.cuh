// qkv_a_proj_ag_kernel's counting warp: it publishes row blocks that are finished, and normalises them before.
#pragma once
#include "qkv_a_proj_ag.cuh"

namespace tpf {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Of a norm's weight, which stays in L1. Volatile: all of a row's at once would not find room in registers.
__device__ inline uint4 load_weight(const void* address) {
  uint4 raw;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(raw.x), "=r"(raw.y), "=r"(raw.z), "=r"(raw.w)
               : "l"(address));
  return raw;
}

// A lane's vectors of one of the two normed parts of a row. What lies outside is 0.
template <int kVectors>
struct NormedPart {
  template <typename Out>
  __device__ void load(const Out* row, int columns) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int column = column_of(v);
      raw[v] = column < columns ? load16(row + column) : uint4{};
    }
  }

  // In place: of the row as stored, in fp32, rounded once.
  template <typename Out>
  __device__ void store_normed(Out* row, int columns, const Out* weight, float eps) {
    float squares = 0, values[8], scaled[8];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      unpack(values, raw[v], Out{});
#pragma unroll
      for (float value : values) squares = fmaf(value, value, squares);
    }
    // Unpacked again below: all values of the part would not find room in registers.
#pragma unroll
    for (uint4& word : raw) asm volatile("" : "+r"(word.x), "+r"(word.y), "+r"(word.z), "+r"(word.w));
    const float rstd = __frsqrt_rn(warp_sum(squares) / static_cast<float>(columns) + eps);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int column = column_of(v);
      if (column >= columns) break;
      unpack(values, raw[v], Out{});
      unpack(scaled, load_weight(weight + column), Out{});
#pragma unroll
      for (int e = 0; e < 8; ++e) scaled[e] *= values[e] * rstd;
      store16(row + column, pack(scaled, Out{}));
    }
  }

  __device__ static int column_of(int v) { return (v * 32 + static_cast<int>(threadIdx.x % 32)) * 8; }

  uint4 raw[kVectors];
};

// This block's rows of a row block.
template <typename Tiles, typename Out>
__device__ inline void norm_rows(const ProjectionArgs& args, Out* rows, int row_block) {
  const int own = static_cast<int>(args.partition.rows(args.team.rank).count);
  const int end = min((row_block + 1) * Tiles::kRows, own);
  const int q_columns = args.columns[0], kv_columns = args.columns[1];
#pragma unroll 1
  for (int row = row_block * Tiles::kRows + blockIdx.x; row < end; row += gridDim.x) {
    Out* const from = rows + int64_t{row} * args.call.columns;
    NormedPart<kQVectors> q_a;
    NormedPart<kKvVectors> kv_a;
    q_a.load(from, q_columns);
    kv_a.load(from + q_columns, kv_columns);
    q_a.store_normed(from, q_columns, static_cast<const Out*>(args.norm_weights[0]), args.eps);
    kv_a.store_normed(from + q_columns, kv_columns, static_cast<const Out*>(args.norm_weights[1]), args.eps);
  }
}

// Counts this block's finished tiles, and its share of a row block's norms. The grid's counts of a row block come to
// `complete`, and whoever brings the last one sets them back to 0 for the next call.
template <typename Tiles, typename Out, bool kNorm>
__device__ inline void finish_row_blocks(const ProjectionArgs& args, const BlockRound& round,
                                         ProjectionShared& shared) {
  const int lane = threadIdx.x % 32, own = own_row_blocks(args, Tiles::kRows);
  // Row blocks that this rank has no rows for: the peers wait for as many from everyone.
  for (int row_block = own + blockIdx.x; row_block < args.row_blocks; row_block += gridDim.x) {
    publish_row_block(args, round, row_block, lane);
  }
  const auto count_of = [&](int row_block) {
    return cuda::atomic_ref<uint32_t, cuda::thread_scope_device>(
        control(args.team.region[args.team.rank])->finished[row_block]);
  };
  const auto count = [&](int row_block) {
    const uint32_t complete = args.column_tiles + (kNorm ? gridDim.x : 0);
    __syncwarp();
    bool last = lane == 0 && count_of(row_block).fetch_add(1, cuda::memory_order_acq_rel) + 1 == complete;
    last = __shfl_sync(0xffffffffu, last, 0);
    if (!last) return;
    if (lane == 0) count_of(row_block).store(0, cuda::memory_order_relaxed);
    publish_row_block(args, round, row_block, lane);
  };
  const auto reached = [&](auto&& counter, uint32_t wanted) {
    const bool ready = lane == 0 && counter.load(cuda::memory_order_acquire) >= wanted;
    return __shfl_sync(0xffffffffu, ready, 0) != 0;
  };
  // What other warps and blocks are asked for does not wait for a peer: no deadline.
  cuda::atomic_ref<uint32_t, cuda::thread_scope_block> stored(shared.stored);
  const int end = args.row_blocks * args.column_tiles;
  int index = blockIdx.x, normed = kNorm ? 0 : own;
  uint32_t expected = ProjectionShared::kProductWarps;
  while (index < end || normed < own) {
    const int row_block = index < end ? tile_of<Tiles>(index, args).row_block : own;
    if (index < end && (row_block >= own || reached(stored, expected))) {
      if (row_block < own) count(row_block), expected += ProjectionShared::kProductWarps;
      index += gridDim.x;
    } else if (kNorm && normed < own && reached(count_of(normed), args.column_tiles)) {
      norm_rows<Tiles>(args, rows_at<Out, kNorm>(args, round), normed);
      count(normed++);
    } else if (index >= end && __any_sync(0xffffffffu, has_faulted(args.team))) {
      return;  // what is missing belongs to a block that began after the fault
    } else {
      __nanosleep(100);
    }
  }
}

#endif

}  // namespace tpf
