// What qkv_a_proj_ag_kernel does with finished tiles: row blocks that are complete are normalised, and published.
#pragma once
#include "../ptx/async_copy.cuh"
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
  for (int i = threadIdx.x; i < kNormVectors * 32; i += kProjectionThreads) {
    const int part = i < kQVectors * 32 ? 0 : 1, column = (i - part * kQVectors * 32) * kLanes<Out>;
    if (column >= static_cast<int>(part == 0 ? args.call.q_columns : args.call.kv_columns)) continue;
    weights[i] = __ldg(reinterpret_cast<const uint4*>(static_cast<const Out*>(args.norm_weights[part]) + column));
  }
}

// By a warp: norms rows in place, in its slot. kScaled: and quantises q_a, where the call asks for that.
template <typename Out, bool kScaled>
class RowNorm {
 public:
  // buffers: the warp's, kNormBufferBytes in shared memory.
  __device__ RowNorm(const ProjectionArgs& args, const BlockRound& round, const uint4* weights, char* buffers)
      : args_(args), rows_(rows_at<Out, true>(args, round)), weights_(weights + lane()) {
    if (kScaled) buffers_ = reinterpret_cast<uint4*>(buffers) + lane();
  }

  // next: the row after it, if that is complete already; else -1.
  __device__ void norm(int row, int next) {
    if constexpr (kScaled) return norm_from_shared(row, next);
    NormedPart<Out, kQVectors> q_a;
    NormedPart<Out, kKvVectors> kv_a;
    q_a.load(row_of(row, 0), columns(0));
    kv_a.load(row_of(row, 1), columns(1));
    q_a.norm(columns(0), args_.eps, weight_of(0), store_to(row_of(row, 0)));
    kv_a.norm(columns(1), args_.eps, weight_of(1), store_to(row_of(row, 1)));
  }

 private:
  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ int columns(int part) const { return part == 0 ? args_.call.q_columns : args_.call.kv_columns; }
  __device__ Out* row_of(int row, int part) const {
    return rows_ + int64_t{row} * args_.call.columns + (part == 0 ? 0 : args_.call.q_columns);
  }

  __device__ auto weight_of(int part) const {
    const float* const floats = static_cast<const float*>(args_.norm_weights[part]) + lane() * kLanes<Out>;
    const uint4* const kept = weights_ + part * kQVectors * 32;
    return [floats, kept, this](float (&values)[kLanes<Out>], int v) {
      if (has_float_weights(args_)) {
        load_weight(values, floats + v * 32 * kLanes<Out>);
      } else {
        unpack(values, kept[v * 32], Out{});
      }
      if constexpr (!kScaled) {  // fp8 has no weight_offset
#pragma unroll
        for (float& value : values) value += args_.weight_addend;
      }
    };
  }
  __device__ static auto store_to(Out* row) {
    return [own = row + lane() * kLanes<Out>](int v, uint4 vector) { store16(own + v * 32 * kLanes<Out>, vector); };
  }

  // Beside fp8 products there are no registers to hold a row, nor to ask for the next: they wait in shared memory,
  // where a lane has its own vectors.
  __device__ void fetch(int row) {
    stage_ ^= 1;
    fetched_ = row;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const Out* const own = row_of(row, part) + lane() * kLanes<Out>;
      for_vectors(part, [&](int v) { copy16_async(vectors_of(part) + v * 32, own + v * 32 * kLanes<Out>, true); });
    }
  }
  __device__ uint4* vectors_of(int part) const {
    return buffers_ + (stage_ * kNormVectors + (part == 0 ? 0 : kQVectors)) * 32;
  }

  // run(v) for the lane's vectors of a part.
  template <typename Run>
  __device__ void for_vectors(int part, Run&& run) const {
    const int left = columns(part) - lane() * kLanes<Out>;
#pragma unroll 3
    for (int v = 0; v * 32 * kLanes<Out> < left; ++v) run(v);
  }

  __device__ void norm_from_shared(int row, int next) {
    if (fetched_ != row) fetch(row);
    commit_copies();
    uint4* const vectors[2] = {vectors_of(0), vectors_of(1)};
    if (next >= 0) fetch(next);
    commit_copies();
    wait_for_copies<1>();
    float rstd[2];
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      float squares = 0;
      for_vectors(part, [&](int v) {
        float values[kLanes<Out>];
        unpack(values, vectors[part][v * 32], Out{});
#pragma unroll
        for (float value : values) squares = fmaf(value, value, squares);
      });
      __syncwarp();  // besides: all lanes' vectors have left the row, which is written below
      rstd[part] = __frsqrt_rn(warp_sum(squares) / static_cast<float>(columns(part)) + args_.eps);
    }
    norm_part(1, rstd[1], vectors[1], store_to(row_of(row, 1)));
    if (!is_q_a_quantized<true>(args_)) return norm_part(0, rstd[0], vectors[0], store_to(row_of(row, 0)));
    // Lane v of 16 finds the scale of the group of which these have vector v: a warp divides once. All lanes have as
    // many vectors, since quantizes_q_a asks for whole ones.
    static_assert(kQVectors <= 16);
    float amax = 0;
    norm_part(0, rstd[0], vectors[0], [&](int v, uint4 vector) {
      vectors[0][v * 32] = vector;
      const float found = amax_of_group(vector);
      if (lane() % 16 == v) amax = found;
    });
    const Fp8Scale scale(amax, (args_.call.variant & TPF_ROUND_SCALES) != 0);
    const int group = lane() % 16 * 2 + lane() / 16, groups = columns(0) / kQuantizedColumns;
    float* const scales = reinterpret_cast<float*>(row_of(row, 1)) - groups;
    if (group < groups) scales[group] = scale.scale;
    uint8_t* const q = reinterpret_cast<uint8_t*>(scales) - columns(0) + lane() * kLanes<Out>;
    for_vectors(0, [&](int v) {
      float values[kLanes<Out>];
      unpack(values, vectors[0][v * 32], Out{});
      store_e4m3(q + v * 32 * kLanes<Out>, values, __shfl_sync(0xffffffffu, scale.inverse, v, 16));
    });
  }

  template <typename Store>
  __device__ void norm_part(int part, float rstd, const uint4* vectors, Store&& store) const {
    const auto weight = weight_of(part);
    for_vectors(part, [&](int v) {
      float values[kLanes<Out>], scaled[kLanes<Out>];
      unpack(values, vectors[v * 32], Out{});
      weight(scaled, v);
#pragma unroll
      for (int i = 0; i < kLanes<Out>; ++i) scaled[i] *= values[i] * rstd;
      store(v, pack(scaled, Out{}));
    });
  }

  const ProjectionArgs& args_;
  Out* const rows_;
  const uint4* const weights_;
  uint4* buffers_;
  int fetched_ = -1, stage_ = 0;
};

__device__ inline auto count_of(const ProjectionArgs& args, int row_block) {
  return AtomicRef<uint32_t, kDeviceScope>(control(args.team.region[args.team.rank])->finished[row_block]);
}

// By a warp: whether a counter has come so far. What other warps and blocks are asked for does not wait for a peer: no
// deadline.
template <typename Counter>
__device__ inline bool has_come_to(const Counter& counter, uint32_t wanted) {
  const bool ready = threadIdx.x % 32 == 0 && counter.load(order::memory_order_acquire) >= wanted;
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
      lane == 0 && count_of(args, row_block).fetch_add(finished, order::memory_order_acq_rel) + finished == complete;
  __syncwarp();  // what lane 0 has acquired, every lane releases to its peer
  last = __shfl_sync(0xffffffffu, last, 0);
  if (!last) return;
  if (lane == 0) count_of(args, row_block).store(0, order::memory_order_relaxed);
  publish_row_block(args, round, row_block, lane);
}

// Rows that a warp norms one after the other, of one row block: [row, end).
struct NormRun {
  int row, end;
};

// Run `number` of this block's: runs of so many rows go round the grid, from row `first` on. Not the rows from `limit`
// on.
__device__ inline NormRun run_of(int number, int rows, int first, int limit) {
  const int row = first + (number * static_cast<int>(gridDim.x) + blockIdx.x) * rows;
  return {min(row, limit), min(row + rows, limit)};
}

// By a warp: the next run that no other warp of the block has taken. Of 16 bits these are the late row blocks' rows,
// the others the counting warp's; beside fp8 products, which are over sooner, all warps that norm share all rows.
template <typename Tiles>
__device__ inline NormRun take_rows(const ProjectionArgs& args, ProjectionShared& shared) {
  const int own = static_cast<int>(args.partition.rows(args.team.rank).count);
  const bool many = Tiles::kScaled && own >= kNormedRun * kProductWarps * static_cast<int>(gridDim.x);
  int taken = 0;
  if (threadIdx.x % 32 == 0) taken = atomicAdd_block(&shared.taken, 1);
  taken = __shfl_sync(0xffffffffu, taken, 0);
  const int first = Tiles::kScaled ? 0 : min(own, first_late_row_block(args) * Tiles::kRows);
  return run_of(taken, many ? kNormedRun : 1, first, own);
}

// By a warp: rows of row blocks that are complete, or will be.
template <typename Tiles, typename Out>
__device__ inline void norm_rows(const ProjectionArgs& args, const BlockRound& round, ProjectionShared& shared,
                                 const uint4* weights, char* buffers) {
  RowNorm<Out, Tiles::kScaled> rows(args, round, weights, buffers);
#pragma unroll 1
  for (NormRun run = take_rows<Tiles>(args, shared); run.row < run.end; run = take_rows<Tiles>(args, shared)) {
    const int row_block = run.row / Tiles::kRows;
    for (int looks = 1; !has_come_to(count_of(args, row_block), args.column_tiles); ++looks) {
      if (looks % 64 == 0 && __any_sync(0xffffffffu, has_faulted(args.team))) return;  // see finish_row_blocks
      __nanosleep(200);
    }
#pragma unroll 1
    for (int row = run.row; row < run.end; ++row) rows.norm(row, row + 1 < run.end ? row + 1 : -1);
    count<Tiles, true>(args, round, row_block, run.end - run.row);
  }
}

// The counting warp: this block's finished tiles and, while there are none to count, rows.
template <typename Tiles, typename Out, bool kNorm>
__device__ inline void finish_row_blocks(const ProjectionArgs& args, const BlockRound& round, ProjectionShared& shared,
                                         const uint4* weights, char* buffers) {
  if (is_output<kNorm>(args)) return;  // nobody waits for them
  const int lane = threadIdx.x % 32, own = own_row_blocks(args, Tiles::kRows);
  // Row blocks that this rank has no rows for: the peers wait for as many from everyone.
  for (int row_block = own + blockIdx.x; row_block < args.row_blocks; row_block += gridDim.x) {
    publish_row_block(args, round, row_block, lane);
  }
  AtomicRef<uint32_t, kBlockScope> stored(shared.stored);
  RowNorm<Out, Tiles::kScaled> rows(args, round, weights, buffers);
  int number = 0;
  const auto next_run = [&] {
    if (!kNorm) return NormRun{};
    if (Tiles::kScaled) return take_rows<Tiles>(args, shared);
    const int count = static_cast<int>(args.partition.rows(args.team.rank).count);
    return run_of(number++, kNormedRun, 0, min(first_late_row_block(args) * Tiles::kRows, count));
  };
  const int end = args.row_blocks * args.column_tiles;
  NormRun run = next_run();
  int index = blockIdx.x, row = run.row, complete = -1;  // the row block that is being normalised
  uint32_t expected = kProductWarps;
  while (index < end || row < run.end) {
    const int row_block = index < end ? tile_of(index, args).row_block : own;
    if (index < end && (row_block >= own || has_come_to(stored, expected))) {
      if (row_block < own) count<Tiles, kNorm>(args, round, row_block, 1), expected += kProductWarps;
      index += gridDim.x;
    } else if (kNorm && row < run.end &&
               (row / Tiles::kRows == complete || has_come_to(count_of(args, row / Tiles::kRows), args.column_tiles))) {
      // One row at a time: the next finished tile shall not wait for many.
      complete = row / Tiles::kRows;
      rows.norm(row, row + 1 < run.end ? row + 1 : -1);
      if (++row < run.end) continue;
      count<Tiles, true>(args, round, complete, run.end - run.row);
      run = next_run();
      row = run.row;
    } else if (index >= end && __any_sync(0xffffffffu, has_faulted(args.team))) {
      return;  // what is missing belongs to a block that began after the fault
    } else {
      __nanosleep(100);
    }
  }
}

#endif

}  // namespace tpf
