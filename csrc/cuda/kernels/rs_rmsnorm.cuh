// rs_rmsnorm_kernel: reduce-scatter, and what follows it on a row that is in registers anyway. rs_rmsnorm,
// rs_rmsnorm_fp8, rs_rmsnorm_ag and reduce_scatter_rows are this kernel with different epilogues.
//
// Block b of every rank owns rows b, b + grid, b + 2 grid, ... of each rank's share: the rows it stages for a peer are
// those that block b of the peer adds up. Rows go in chunks; chunk c is published at step c, and may be added up while
// chunk c + 1 is being staged. A staged row is written straight into the slot of the rank that wants it.
//
// Four bodies. kOneRow: at most one row a block, or a few that are posted; every thread holds its vector of all rows
// that come and go, and from sm_90 on a cluster of blocks may share the row. kBulk, with TMA on sm_90 and newer: one
// warp stages, one warp fetches rows into a ring of shared-memory buffers, and the others add them up from there; a
// cluster of blocks shares each row where a ring holds too few whole ones. kDirect, everywhere else: every thread loads
// and stores 16 bytes at a time. kAllRows, of few tokens in rs_rmsnorm_ag and rs_rmsnorm_ag_fp8: every rank posts all
// its rows to all others and adds up all rows itself, so that nothing is left to gather.
#pragma once
#include <cfloat>

#include "../../plan/reduce.h"
#include "../comm/bulk_copier.cuh"
#include "../comm/peers.cuh"
#include "../ptx/async_copy.cuh"
#include "../ptx/cluster.cuh"
#include "../ptx/vec.cuh"

namespace tpf {

#if defined(__CUDA_ARCH__)
constexpr int kCompiledFor = __CUDA_ARCH__ / 10;
#else
constexpr int kCompiledFor = 0;
#endif

enum class Epilogue { kSum, kNorm, kFp8, kGather };

constexpr int kGatherStep = kMaxChunks;  // steps 0..6 staging, 7..13 gathering, 15 closing
constexpr int kMaxWarpValues = 136;      // warps' values of a row: its vectors, 32 at a time, and some behind its end

struct ReduceArgs {
  void* output;        // kNorm, kFp8 with TPF_KEEP_OUTPUT: [rows, hidden]; kGather: [num_tokens, hidden]
  void* residual_out;  // [rows, hidden]
  uint8_t* q;          // kFp8: [rows, hidden]; with TPF_GATHERED of all tokens, scale too
  float* scale;
  const void* input;
  const void* residual;
  const void* weight;
  tpf_symm symm;  // where call.source >= 0
  tpf_team team;
  tpf_call call;
  uint32_t fingerprint;
  float eps, weight_addend;
  int64_t scale_row_stride, scale_group_stride;
  Partition partition;
  int32_t chunk_rows;  // rows of one chunk, for one block
  int32_t num_chunks;
  int32_t stages;                 // kBulk: row buffers of the ring
  int32_t cluster, cluster_log2;  // blocks that share a row; a shift takes less time than a division
  uint32_t no_bits;               // 0, which the compiler does not know: see barrier_arrive_having
};

// What the threads of a block derive from the arguments once.
template <typename T>
struct RowView {
  __device__ explicit RowView(const ReduceArgs& args, uint32_t epoch = 0)
      : args(args),
        rank(args.team.rank),
        world_size(args.team.world_size),
        hidden(args.call.hidden_size),
        own(args.partition.rows(args.team.rank)),
        complete((args.call.variant & TPF_COMPLETE) != 0),
        zero_copy(args.call.source >= 0),
        epoch(epoch) {}

  // Row `row` of this rank's share, as `source` contributes it.
  __device__ const T* source_row(int source, int64_t row) const {
    const int64_t at = (own.start + row) * hidden;
    if (source == rank || complete) return static_cast<const T*>(args.input) + at;
    if (zero_copy) return reinterpret_cast<const T*>(input_of(args.symm, source)) + at;
    return staged_row(rank, source, row);
  }
  // Where `source` stages row `row` of `peer`'s share.
  __device__ T* staged_row(int peer, int source, int64_t row) const {
    return reinterpret_cast<T*>(slot_of(args.team, peer, epoch)) + (source * args.partition.largest() + row) * hidden;
  }
  // Where `source` publishes its normalised row `row`: in its own slot of the next round.
  __device__ T* gathered_row(int source, int64_t row) const {
    return reinterpret_cast<T*>(slot_of(args.team, source, epoch + 1)) + row * hidden;
  }
  __device__ Rows rows(int peer) const { return args.partition.rows(peer); }
  // Of the blocks or, where these share rows, of the clusters.
  __device__ int row_block() const { return static_cast<int>(blockIdx.x >> args.cluster_log2); }
  __device__ int row_blocks() const { return static_cast<int>(gridDim.x >> args.cluster_log2); }
  __device__ int64_t row_of(int step) const { return int64_t{step} * row_blocks() + row_block(); }
  __device__ bool staged() const { return !zero_copy && !complete && world_size > 1; }
  __device__ bool has_residual() const { return (args.call.variant & TPF_RESIDUAL) != 0; }
  __device__ int num_sources() const { return complete ? 1 : world_size; }

  const ReduceArgs& args;
  const int rank, world_size, hidden;
  const Rows own;
  const bool complete, zero_copy;
  const uint32_t epoch;
};

// Of a kernel that is compiled for kRanks ranks, 0 being any number: what they are, where the compiler may know it.
template <int kRanks>
constexpr int kMostRanks = kRanks > 0 ? kRanks : TPF_MAX_RANKS;
template <int kRanks, typename T>
__device__ inline int world_size_of(const RowView<T>& view) {
  return kRanks > 0 ? kRanks : view.world_size;
}

// What the threads that add up a row tell each other. In shared memory, in two buffers in turn.
struct WarpValues {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  // Where a cluster shares the row, by one thread of each block; a barrier of the cluster follows. count: of the values
  // that its threads make of a row.
  __device__ void init(int count) {
    for (uint64_t& barrier : arrived) {
      barrier_init(&barrier, 1);
      barrier_expect(&barrier, count * sizeof(float));
    }
    fence_barrier_init();
  }
  __device__ void send(int turn, int at, float value, int cta) {
    cluster_store_async(&values[turn % 2][at], &arrived[turn % 2], cta, value);
  }
  // Until all of a turn have come. One thread says what is expected of the turn after the next.
  __device__ void wait(int turn, int count, bool one) {
    cluster_wait_stores(&arrived[turn % 2], turn / 2 & 1);
    if (one) barrier_expect(&arrived[turn % 2], count * sizeof(float));
  }
#else  // no clusters: a row is not shared
  __device__ void init(int) {}
  __device__ void send(int, int, float, int) {}
  __device__ void wait(int, int, bool) {}
#endif

  float values[2][kMaxWarpValues];
  uint64_t arrived[2];  // a cluster's: all of its blocks send all of theirs to each
};

// The threads that add up a row together: the whole block, or all but the helping warps, of all blocks of a cluster.
// Thread t of a block holds vectors first + t, first + t + threads, ... of the row.
struct RowThreads {
  __device__ void sync() const { asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory"); }
  __device__ int vector(int v) const { return first + v * threads + thread; }

  int threads;              // of a block
  int thread;               // this one's place among them
  WarpValues& warp_values;  // in shared memory
  int first = 0;            // of the row's vectors: not 0 where blocks share the row
  int cluster = 1;          // how many blocks do
};

// What all threads of the group make of their values. A sum is added up in an order that depends on the columns alone:
// 32 vectors at a time, then these. So a row has the same bits whatever body and however many threads work on it.
// `turn` counts these calls: between two buffers in turn, one barrier each is enough. `meanwhile()` is done before the
// others are waited for.
template <int kVecs, typename Combine, typename Meanwhile>
__device__ inline float group_reduce(const float (&values)[kVecs], Combine combine, const RowThreads& group, int turn,
                                     Meanwhile&& meanwhile) {
  const float* const warp_values = group.warp_values.values[turn % 2];
  const int lane = group.thread % 32, count = group.cluster * kVecs * group.threads / 32;
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    const float value = warp_reduce(values[v], combine);
    const int at = group.vector(v) / 32;
    if (group.cluster > 1) {
      if (lane < group.cluster) group.warp_values.send(turn, at, value, lane);
    } else if (lane == 0) {
      group.warp_values.values[turn % 2][at] = value;
    }
  }
  meanwhile();
  if (group.cluster > 1) {
    group.warp_values.wait(turn, count, group.thread == 0);
  } else {
    group.sync();
  }
  float all = 0;  // of a maximum, too: it is one of magnitudes
  for (int at = 0; at < count; at += 32) {
    all = combine(all, warp_reduce(at + lane < count ? warp_values[at + lane] : 0.0f, combine));
  }
  return all;
}

template <typename T>
__device__ inline void add_vector(float (&sums)[kLanes<T>], uint4 raw) {
  float values[kLanes<T>];
  unpack(values, raw, T{});
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) sums[i] += values[i];
}

// The norm's weight: of the rows' dtype in registers, where threads hold few vectors of a row; otherwise, and where it
// is fp32 beside 16-bit rows, read again for every row.
template <typename T, int kVecs>
struct RowWeight {
  static constexpr bool kKept = kVecs <= 2;

  __device__ void init(const RowView<T>& view, const RowThreads& group) {
    is_float = (view.args.call.variant & TPF_FLOAT_WEIGHT) != 0;
    if constexpr (kKept) {
#pragma unroll
      for (int v = 0; v < kVecs; ++v) {
        const int column = group.vector(v) * kLanes<T>;
        const T* const weight = static_cast<const T*>(view.args.weight) + column;
        kept[v] = !is_float && column < view.hidden ? __ldg(reinterpret_cast<const uint4*>(weight)) : uint4{};
      }
    }
  }
  // In two steps, where there are not the registers to keep it meanwhile: `place`, in shared memory, is this thread's,
  // and what begin_init copies there has been waited for in between.
  __device__ void begin_init(const RowView<T>& view, const RowThreads& group, uint4* place) const {
    static_assert(kVecs == 1);
    const int column = group.vector(0) * kLanes<T>;
    const bool here = (view.args.call.variant & TPF_FLOAT_WEIGHT) == 0 && column < view.hidden;
    copy16_async(place, static_cast<const T*>(view.args.weight) + column, here);
  }
  __device__ void end_init(const RowView<T>& view, const uint4* place) {
    is_float = (view.args.call.variant & TPF_FLOAT_WEIGHT) != 0;
    kept[0] = *place;
  }
  // Of vector v, which begins at `column`, inside the row.
  __device__ void get(float (&values)[kLanes<T>], int v, const RowView<T>& view, int column) const {
    if (kKept && !is_float) {
      unpack(values, kept[v], T{});
#pragma unroll
      for (float& value : values) value += view.args.weight_addend;
    } else {
      load_norm_weight<T>(values, view.args.weight, column, is_float, view.args.weight_addend);
    }
  }

  bool is_float;
  uint4 kept[kKept ? kVecs : 1];
};

struct Nothing {
  __device__ void operator()() const {}
};

// Whether a row is one fp8 group, for which its threads meet a second time.
template <typename T>
__device__ inline bool has_one_scale(const RowView<T>& view) {
  return static_cast<int>(view.args.call.group_size) >= view.hidden;
}

// Row `row` of q to e4m3, each group_size columns with a scale of their own. A smaller group than a row is a run of
// lanes of one warp: its size is a power of two, the op sees to it.
template <typename T, int kVecs>
__device__ inline void quantize_row(const RowView<T>& view, int64_t row, const float (&normed)[kVecs][kLanes<T>],
                                    const RowThreads& group, int turn) {
  const ReduceArgs& args = view.args;
  const int log_group_size = __ffs(args.call.group_size) - 1, lanes = (1 << log_group_size) / kLanes<T>;
  const bool one_scale = has_one_scale(view);
  float amax[kVecs] = {};
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
#pragma unroll
    for (float value : normed[v]) amax[v] = fmaxf(amax[v], fabsf(value));
    if (!one_scale) amax[v] = warp_reduce(amax[v], Max{}, lanes);
  }
  const float row_amax = one_scale ? group_reduce(amax, Max{}, group, turn, Nothing{}) : 0;
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    const int column = group.vector(v) * kLanes<T>;
    if (column >= view.hidden) continue;
    const Fp8Scale scale(one_scale ? row_amax : amax[v], (args.call.variant & TPF_ROUND_SCALES) != 0);
    store_e4m3(args.q + row * view.hidden + column, normed[v], scale.inverse);
    const int index = one_scale ? 0 : column >> log_group_size;
    if (index << log_group_size == column) {
      args.scale[row * args.scale_row_stride + index * args.scale_group_stride] = scale.scale;
    }
  }
}

// Where a normalised vector of this rank's row `row` is to be gathered from: its own slot of the next round.
template <typename T>
struct IntoSlot {
  __device__ void operator()(int64_t row, int column, uint4 normed) const {
    store16(view.gathered_row(view.rank, row) + column, normed);
  }
  const RowView<T>& view;
};

// What is done with a summed row: round, store, normalise, quantise. Threads hold kVecs vectors of it each. `row` is
// one of this rank's share; in kAllRows one of all, and what a rank keeps of its own share alone is kept of these.
// Nothing is offered to be gathered after a fault: a peer may still read what the call before did.
template <typename T, int kVecs, Epilogue kEpilogue, bool kAllRows, typename Meanwhile, typename Offer>
__device__ inline void finish_row(const RowView<T>& view, int64_t row, float (&sums)[kVecs][kLanes<T>],
                                  const RowWeight<T, kVecs>& weight, const RowThreads& group, int step, bool arrived,
                                  Meanwhile&& meanwhile, Offer&& offer) {
  const ReduceArgs& args = view.args;
  const int64_t own_row = kAllRows ? row - view.own.start : row;
  const bool owned = !kAllRows || (own_row >= 0 && own_row < view.own.count);
  T* stored = static_cast<T*>(args.residual_out) + own_row * view.hidden;
  float squares[kVecs] = {};
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    const int column = group.vector(v) * kLanes<T>;
    const uint4 rounded = pack(sums[v], T{});
    if (column < view.hidden && owned) {
      kEpilogue == Epilogue::kSum ? store16(stored + column, rounded) : store16_streaming(stored + column, rounded);
    }
    unpack(sums[v], rounded, T{});
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i) squares[v] = fmaf(sums[v][i], sums[v][i], squares[v]);
  }
  if constexpr (kEpilogue == Epilogue::kSum) return meanwhile();

  const int turn = kEpilogue == Epilogue::kFp8 && has_one_scale(view) ? 2 * step : step;
  const float mean = group_reduce(squares, Sum{}, group, turn, meanwhile) / static_cast<float>(view.hidden);
  const float rstd = __frsqrt_rn(mean + args.eps);
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    const int column = group.vector(v) * kLanes<T>;
    const bool inside = column < view.hidden;
    float scaled[kLanes<T>] = {};
    if (inside) weight.get(scaled, v, view, column);
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i) scaled[i] *= sums[v][i] * rstd;
    const uint4 rounded = pack(scaled, T{});
    if constexpr (kEpilogue == Epilogue::kNorm || (kAllRows && kEpilogue == Epilogue::kGather)) {
      if (inside) store16(static_cast<T*>(args.output) + row * view.hidden + column, rounded);
    } else if constexpr (kEpilogue == Epilogue::kGather) {
      if (inside) {
        store16_streaming(static_cast<T*>(args.output) + (view.own.start + row) * view.hidden + column, rounded);
        if (arrived) offer(row, column, rounded);
      }
    } else {
      if (inside && owned && (args.call.variant & TPF_KEEP_OUTPUT) != 0) {
        store16(static_cast<T*>(args.output) + own_row * view.hidden + column, rounded);
      }
      unpack(sums[v], rounded, T{});  // what is quantised is the row as it would have been stored
    }
  }
  if constexpr (kEpilogue == Epilogue::kFp8) quantize_row(view, row, sums, group, turn + 1);
}

template <typename T, int kVecs, Epilogue kEpilogue>
__device__ inline void finish_row(const RowView<T>& view, int64_t row, float (&sums)[kVecs][kLanes<T>],
                                  const RowWeight<T, kVecs>& weight, const RowThreads& group, int step, bool arrived) {
  finish_row<T, kVecs, kEpilogue, false>(view, row, sums, weight, group, step, arrived, Nothing{}, IntoSlot<T>{view});
}

// Whether blocks take their rows one by one, since some SMs come to their data faster than others. What peers stage or
// gather by chunks is every grid-th row, and blocks that share their rows have the same ones.
template <Epilogue kEpilogue, typename T>
__device__ inline bool claims_rows(const RowView<T>& view) {
  return kEpilogue != Epilogue::kGather && !view.staged() && view.args.cluster == 1;
}

// The next row nobody has taken yet, after the first ones, of which each block has one.
__device__ inline int64_t claim_row(const tpf_team& team, const BlockRound& round) {
  return int64_t{gridDim.x} + atomicAdd(&control(team.region[team.rank])->claims[round.call_number & 1], 1u);
}

template <typename T>
__device__ inline bool wait_for_peers(const RowView<T>& view, const BlockRound& round, int step, int lane) {
  return wait_for_peers(view.args.team, view.args.call, round, step, lane);
}

// The same of the closing step. A peer that gave up after its own word of that step may have changed its input before
// it was read here, and has told this rank before: the thread that has no peer looks whether one has.
template <typename T>
__device__ inline bool wait_for_readers(const RowView<T>& view, const BlockRound& round, int lane) {
  if (lane == view.rank) return !was_notified(view.args.team);
  return wait_for_peers(view, round, kClosingStep, lane);
}

// By all threads, as the last thing an op does: whether all has arrived. In rs_rmsnorm_ag no closing step comes after
// inputs are read in place; what peers gave up then is looked for when all has been read and gathered, their rows too.
// kAllRows reads no input in place, whatever its epilogue: what has been posted is a copy, which a peer that gives up
// later does not change.
template <Epilogue kEpilogue, typename T>
__device__ inline bool all_arrived(const RowView<T>& view, bool arrived) {
  if (!__syncthreads_and(arrived)) return false;
  if (kEpilogue != Epilogue::kGather || !view.zero_copy) return true;
  return __syncthreads_and(threadIdx.x > 0 || !was_notified(view.args.team));
}

}  // namespace tpf
