// What qkv_a_proj_ag_kernel does with finished tiles: row blocks that are complete are normalised, and published.
#pragma once
#include "latent_norm.cuh"
#include "qkv_a_proj_ag.cuh"

namespace tpf {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ inline bool has_float_weights(const ProjectionArgs& args) {
  return (args.call.variant & TPF_FLOAT_WEIGHT) != 0;
}

// By all threads: the two norms' weights, into shared memory. A warp that has few registers would wait for each of a
// row's vectors out of the L2 cache: acquires of other warps keep emptying the L1. There is no room for fp32 ones.
template <typename Out>
__device__ inline void keep_norm_weights(const ProjectionArgs& args, uint4* weights) {
  if (has_float_weights(args)) return;
  for (int i = threadIdx.x; i < (kQVectors + kKvVectors) * 32; i += kProjectionThreads) {
    const int part = i < kQVectors * 32 ? 0 : 1, column = (i - part * kQVectors * 32) * kLanes<Out>;
    if (column >= static_cast<int>(part == 0 ? args.call.q_columns : args.call.kv_columns)) continue;
    weights[i] = __ldg(reinterpret_cast<const uint4*>(static_cast<const Out*>(args.norm_weights[part]) + column));
  }
}

// By a warp: in place, in its slot. Whether q_a is quantised, only fp8 calls ask.
template <typename Out, bool kScaled>
__device__ inline void norm_row(const ProjectionArgs& args, const BlockRound& round, int row, const uint4* weights) {
  Out* const q_row = rows_at<Out, true>(args, round) + int64_t{row} * args.call.columns;
  const int q_columns = args.call.q_columns, kv_columns = args.call.kv_columns;
  Out* const kv_row = q_row + q_columns;
  const int lane = threadIdx.x % 32;
  const auto weight_of = [&](int part) {
    const float* const floats = static_cast<const float*>(args.norm_weights[part]) + lane * kLanes<Out>;
    const uint4* const kept = weights + part * kQVectors * 32 + lane;
    return [=, &args](float (&values)[kLanes<Out>], int v) {
      if (has_float_weights(args)) {
        load_weight(values, floats + v * 32 * kLanes<Out>);
      } else {
        unpack(values, kept[v * 32], Out{});
      }
#pragma unroll
      for (float& value : values) value += args.weight_addend;
    };
  };
  const auto store_to = [&](Out* to) {
    return [to, lane](int v, uint4 vector) { store16(to + (v * 32 + lane) * kLanes<Out>, vector); };
  };
  if constexpr (!kScaled) {
    NormedPart<Out, kQVectors> q_a;
    NormedPart<Out, kKvVectors> kv_a;
    q_a.load(q_row, q_columns);
    kv_a.load(kv_row, kv_columns);
    q_a.norm(q_columns, args.eps, weight_of(0), store_to(q_row));
    kv_a.norm(kv_columns, args.eps, weight_of(1), store_to(kv_row));
    return;
  }
  float* const scales = reinterpret_cast<float*>(kv_row) - q_columns / kQuantizedColumns;
  uint8_t* const q = reinterpret_cast<uint8_t*>(scales) - q_columns;
  norm_part_twice<Out, 2>(q_row, q_columns, args.eps, weight_of(0), [&](int v, uint4 vector) {
    if (!is_q_a_quantized<true>(args)) return store_to(q_row)(v, vector);
    // Written behind what is still to be read again.
    const float scale = quantize_vector(q + (v * 32 + lane) * 8, vector, (args.call.variant & TPF_ROUND_SCALES) != 0);
    if (lane % 16 == 0) scales[2 * v + lane / 16] = scale;
  });
  norm_part_twice<Out, 2>(kv_row, kv_columns, args.eps, weight_of(1), store_to(kv_row));
}

__device__ inline auto count_of(const ProjectionArgs& args, int row_block) {
  return cuda::atomic_ref<uint32_t, cuda::thread_scope_device>(
      control(args.team.region[args.team.rank])->finished[row_block]);
}

// By a warp: whether a counter has come so far. What other warps and blocks are asked for does not wait for a peer: no
// deadline.
template <typename Counter>
__device__ inline bool has_come_to(const Counter& counter, uint32_t wanted) {
  const bool ready = threadIdx.x % 32 == 0 && counter.load(cuda::memory_order_acquire) >= wanted;
  __syncwarp();  // which orders memory, as a shuffle does not: what one lane has acquired, all may read
  return __shfl_sync(0xffffffffu, ready, 0) != 0;
}

// By a warp: counts what it has finished of a row block, of which there are column_tiles tiles and, to be normalised,
// its rows. Whoever brings the last one sets the count back to 0 for the next call, and publishes the row block.
template <typename Tiles, bool kNorm>
__device__ inline void count(const ProjectionArgs& args, const BlockRound& round, int row_block, uint32_t finished) {
  const int lane = threadIdx.x % 32, own = static_cast<int>(args.partition.rows(args.team.rank).count);
  const uint32_t complete = args.column_tiles + (kNorm ? min(Tiles::kRows, own - row_block * Tiles::kRows) : 0);
  __syncwarp();
  bool last =
      lane == 0 && count_of(args, row_block).fetch_add(finished, cuda::memory_order_acq_rel) + finished == complete;
  __syncwarp();  // what lane 0 has acquired, every lane releases to its peer
  last = __shfl_sync(0xffffffffu, last, 0);
  if (!last) return;
  if (lane == 0) count_of(args, row_block).store(0, cuda::memory_order_relaxed);
  publish_row_block(args, round, row_block, lane);
}

// By all warps that multiply, when they have done that. The late row blocks' rows go round the grid's, as the other
// rows go round its counting warps.
template <typename Tiles, typename Out>
__device__ inline void norm_late_rows(const ProjectionArgs& args, const BlockRound& round, const uint4* weights) {
  const int own = static_cast<int>(args.partition.rows(args.team.rank).count);
  const int warp = threadIdx.x / 32 - kOtherWarps;
  int row = first_late_row_block(args) * Tiles::kRows + warp * gridDim.x + blockIdx.x;
#pragma unroll 1
  for (; row < own; row += kProductWarps * gridDim.x) {
    const int row_block = row / Tiles::kRows;
    for (int looks = 1; !has_come_to(count_of(args, row_block), args.column_tiles); ++looks) {
      if (looks % 64 == 0 && __any_sync(0xffffffffu, has_faulted(args.team))) return;  // see finish_row_blocks
      __nanosleep(200);
    }
    norm_row<Out, Tiles::kScaled>(args, round, row, weights);
    count<Tiles, true>(args, round, row_block, 1);
  }
}

// The counting warp: this block's finished tiles, and its rows of the row blocks that are not late.
template <typename Tiles, typename Out, bool kNorm>
__device__ inline void finish_row_blocks(const ProjectionArgs& args, const BlockRound& round, ProjectionShared& shared,
                                         const uint4* weights) {
  if (is_output<kNorm>(args)) return;  // nobody waits for them
  const int lane = threadIdx.x % 32, own = own_row_blocks(args, Tiles::kRows);
  // Row blocks that this rank has no rows for: the peers wait for as many from everyone.
  for (int row_block = own + blockIdx.x; row_block < args.row_blocks; row_block += gridDim.x) {
    publish_row_block(args, round, row_block, lane);
  }
  cuda::atomic_ref<uint32_t, cuda::thread_scope_block> stored(shared.stored);
  const int end = args.row_blocks * args.column_tiles;
  const int rows = kNorm ? min(first_late_row_block(args) * Tiles::kRows,
                               static_cast<int>(args.partition.rows(args.team.rank).count))
                         : 0;
  int index = blockIdx.x, row = blockIdx.x * kNormedRun, complete = -1;  // the row block that is being normalised
  uint32_t expected = kProductWarps, normed = 0;                         // this block's rows of it
  while (index < end || row < rows) {
    const int row_block = index < end ? tile_of(index, args).row_block : own;
    if (index < end && (row_block >= own || has_come_to(stored, expected))) {
      if (row_block < own) count<Tiles, kNorm>(args, round, row_block, 1), expected += kProductWarps;
      index += gridDim.x;
    } else if (kNorm && row < rows &&
               (row / Tiles::kRows == complete || has_come_to(count_of(args, row / Tiles::kRows), args.column_tiles))) {
      // One row at a time: the next finished tile shall not wait for many.
      complete = row / Tiles::kRows;
      norm_row<Out, Tiles::kScaled>(args, round, row, weights);
      ++row, ++normed;
      if (row % kNormedRun == 0) row += (gridDim.x - 1) * kNormedRun;
      if (row < rows && row / Tiles::kRows == complete) continue;
      count<Tiles, true>(args, round, complete, normed);
      normed = 0;
    } else if (index >= end && __any_sync(0xffffffffu, has_faulted(args.team))) {
      return;  // what is missing belongs to a block that began after the fault
    } else {
      __nanosleep(100);
    }
  }
}

#endif

}  // namespace tpf
