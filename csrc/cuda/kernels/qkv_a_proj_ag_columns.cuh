// qkv_a_proj_ag_columns_kernel: the projection of few rows that every rank has (TPF_COMPLETE), and its gather. Each
// rank multiplies all rows by its share of the weight, so reads 1/W of it, and posts the columns to all ranks.
//
// The time of such a product is that of reading the weight. A cluster of blocks takes some units of 8 columns; its
// blocks, and in these the warps, share out K in K blocks of 64 bytes, and add up what they have in a fixed order:
// first the warps' sums, then the blocks'. A lane has 16 bytes of a row along K: the two factors have their elements in
// the same order, though not in the instruction's, which a sum does not mind. The weight is on its way to the L2 cache
// before the kernel before this one has ended (PDL); no further, for that kernel may have written it.
//
// A finished vector of 8 columns is posted into all ranks' inboxes, this rank's too, as flag-in-data. Then each rank
// takes whole rows from its inbox, a warp a part of a row, and normalises q_a and kv_a on the way.
#pragma once
#include "../ptx/async_copy.cuh"
#include "../ptx/cluster.cuh"
#include "../ptx/mma.cuh"
#include "qkv_a_proj_ag_columns_finish.cuh"

namespace tpf {

// What one warp multiplies: K blocks first, first + step, ..., in one pass after the other. A pass is of
// kColumnUnits units and one block of rows; those of the same units follow each other, so that the weight is in a
// cache.
//
// Operands go through a ring in shared memory, of which each thread has its own 16 bytes of every vector: it reads what
// it has copied, and nobody waits for another. A place in the ring is filled anew one K block after it was read.
template <typename In, int kRowTiles>
struct WarpProduct {
  static constexpr bool kScaled = sizeof(In) == 1;
  static constexpr int kKBlock = kKBlockBytes / sizeof(In), kLaneElements = 16 / sizeof(In), kHalves = 2 * kRowTiles;

  struct Scales {  // of fp8
    float rows[kHalves], weights[kColumnUnits];
  };

  __device__ WarpProduct(const ColumnsArgs& args, char* ring)
      : args(args),
        ring(ring + threadIdx.x * 16),
        hidden(args.gather.call.hidden_size),
        tokens(static_cast<int>(args.gather.call.num_tokens)),
        step(args.cluster * kColumnsWarps),
        lane_row(static_cast<int>(threadIdx.x) % 32 / 4),
        first(static_cast<int>(blockIdx.x) % args.cluster * kColumnsWarps + static_cast<int>(threadIdx.x) / 32),
        count(max(0, ((hidden + kKBlock - 1) / kKBlock - first + step - 1) / step)),
        column(static_cast<int>(blockIdx.x) / args.cluster * args.units * kColumnUnit + lane_row) {}

  __device__ int num_passes() const { return (args.units + kColumnUnits - 1) / kColumnUnits * args.row_blocks; }
  __device__ void begin_pass(int pass) {
    first_unit = pass / args.row_blocks * kColumnUnits;
    units = min(kColumnUnits, args.units - first_unit);
    first_row = pass % args.row_blocks * 16 * kRowTiles;
    halves = min(kHalves, (tokens - first_row + 7) / 8);
  }

  // The lane's first element along K of K block `i` of the warp's.
  __device__ int k_of(int i) const {
    return (first + i * step) * kKBlock + static_cast<int>(threadIdx.x) % 4 * kLaneElements;
  }
  __device__ char* place(int slot, int vector) const {
    return ring + (slot * args.stage_vectors + vector) * kColumnsThreads * 16;
  }
  // This rank's column of the lane in unit `u` of the pass.
  __device__ int column_of(int u) const { return column + (first_unit + u) * kColumnUnit; }

  __device__ void copy_weight(int i, int slot) const {
    const int k = k_of(i);
#pragma unroll kRowTiles == 4 ? 1 : kColumnUnits  // all addresses at once would take too many registers
    for (int u = 0; u < kColumnUnits; ++u) {
      if (u >= units) break;
      const int at = column_of(u);
      const In* const from = static_cast<const In*>(args.weight) + (args.own.start + at) * hidden + k;
      copy16_async(place(slot, u), from, i < count && at < args.own.count && k < hidden);
    }
  }
  // All that the warp will copy in a pass: a K block of a row is half a line of the cache.
  __device__ void prefetch_weight(int pass) {
    begin_pass(pass);
    if (threadIdx.x % 4 != 0) return;
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
#pragma unroll
      for (int u = 0; u < kColumnUnits; ++u) {
        const int at = column_of(u);
        if (u >= units || at >= args.own.count) break;
        prefetch_to_l2(static_cast<const In*>(args.weight) + (args.own.start + at) * hidden + k_of(i));
      }
    }
  }
  __device__ void copy_rows(int i, int slot) const {
    const int k = k_of(i);
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      if (half >= halves) break;
      const int row = first_row + 8 * half + lane_row;
      const In* const from = static_cast<const In*>(args.input) + int64_t{row} * hidden + k;
      copy16_async(place(slot, args.stage_units + half), from, i < count && row < tokens && k < hidden);
    }
  }
  // The first K blocks of a pass, as many as the ring holds.
  __device__ void fill_ring() const {
#pragma unroll 1
    for (int i = 0; i < args.stages; ++i) {
      copy_weight(i, i);
      copy_rows(i, i);
      commit_copies();
    }
  }
  __device__ void wait_for_k_block() const {
    switch (args.stages) {  // all but the last stages - 2 groups
      case 8:
        return wait_for_copies<6>();
      case 6:
        return wait_for_copies<4>();
      case 4:
        return wait_for_copies<2>();
      default:
        return wait_for_copies<1>();
    }
  }

  __device__ uint4 take(int slot, int vector) const { return *reinterpret_cast<const uint4*>(place(slot, vector)); }

  // K block `i`, which is in `slot`. The next one's scales are on their way meanwhile.
  __device__ void multiply(float (&accumulators)[kRowTiles][kColumnUnits][4], Scales& scales, int i, int slot) const {
    const Scales own = scales;
    if constexpr (kScaled) load_scales(scales, i + 1);
    uint4 weights[kColumnUnits];
#pragma unroll
    for (int u = 0; u < kColumnUnits; ++u) {
      if (u < units) weights[u] = take(slot, u);
    }
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      if (2 * m >= halves) break;
      const uint4 low = take(slot, args.stage_units + 2 * m);
      const uint4 high = 2 * m + 1 < halves ? take(slot, args.stage_units + 2 * m + 1) : uint4{};
#pragma unroll
      for (int u = 0; u < kColumnUnits; ++u) {
        if (u >= units) break;
        const uint4 by = weights[u];
        if constexpr (kScaled) {
          float block[4] = {};
          mma(block, low.x, high.x, low.y, high.y, by.x, by.y, In{});
          mma(block, low.z, high.z, low.w, high.w, by.z, by.w, In{});
#pragma unroll
          for (int at = 0; at < 4; ++at) {
            accumulators[m][u][at] = fmaf(block[at], own.rows[2 * m + at / 2] * own.weights[u], accumulators[m][u][at]);
          }
        } else {
          mma(accumulators[m][u], low.x, high.x, low.y, high.y, by.x, by.y, In{});
          mma(accumulators[m][u], low.z, high.z, low.w, high.w, by.z, by.w, In{});
        }
      }
    }
  }

  // Those of a K block: half of the 128 elements along K that have the same. All columns of a unit have the same, since
  // a rank's share begins at a multiple of 128.
  __device__ void load_scales(Scales& scales, int i) const {
    const int group = (first + i * step) * kKBlock / 128, groups = (hidden + 127) / 128;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const int row = first_row + 8 * half + lane_row;
      const bool inside = i < count && row < tokens;
      scales.rows[half] = inside ? args.scale[row * args.scale_row_stride + group * args.scale_group_stride] : 0;
    }
#pragma unroll
    for (int u = 0; u < kColumnUnits; ++u) {
      const int at = column_of(u);
      const bool inside = i < count && u < units && at < args.own.count;
      const int block = (static_cast<int>(args.own.start) + at) / 128;
      scales.weights[u] = inside ? __ldg(args.weight_scale + block * groups + group) : 0;
    }
  }

  const ColumnsArgs& args;
  char* const ring;
  const int hidden, tokens, step, lane_row, first;
  const int count;   // of the warp's K blocks
  const int column;  // of the rank's
  int first_unit, units, first_row, halves;
};

// The warps' sums of one pass, added up in their order: into the block's sums, [rows, units * kColumnUnit].
template <int kRowTiles>
__device__ inline void add_warps(const float (&accumulators)[kRowTiles][kColumnUnits][4], float* warp_sums,
                                 float* block_sums, int first_row, int first_unit, int units) {
  constexpr int kRows = 16 * kRowTiles, kColumns = kColumnUnits * kColumnUnit;
  const int lane = threadIdx.x % 32;
  float* const own = warp_sums + threadIdx.x / 32 * kRows * kSumsStride;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int u = 0; u < kColumnUnits; ++u) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* const to = own + (16 * m + 8 * half + lane / 4) * kSumsStride + u * kColumnUnit + lane % 4 * 2;
        *reinterpret_cast<float2*>(to) = {accumulators[m][u][2 * half], accumulators[m][u][2 * half + 1]};
      }
    }
  }
  __syncthreads();
  for (int at = threadIdx.x; at < kRows * kColumns; at += kColumnsThreads) {
    const int row = at / kColumns, column = at % kColumns, to = first_unit * kColumnUnit + column;
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < kColumnsWarps; ++warp) {
      sum += warp_sums[(warp * kRows + row) * kSumsStride + column];
    }
    if (to < units * kColumnUnit) block_sums[(first_row + row) * units * kColumnUnit + to] = sum;
  }
  __syncthreads();
}

// The ring is full of the first pass's K blocks.
template <typename In, int kRowTiles>
__device__ inline void multiply_columns(const ColumnsArgs& args, WarpProduct<In, kRowTiles>& product, float* warp_sums,
                                        float* block_sums) {
#pragma unroll 1
  for (int pass = 0; pass < product.num_passes(); ++pass) {
    if (pass > 0) {
      product.begin_pass(pass);
      product.fill_ring();
    }
    typename WarpProduct<In, kRowTiles>::Scales scales = {};
    if constexpr (product.kScaled) product.load_scales(scales, 0);
    float accumulators[kRowTiles][kColumnUnits][4] = {};
    int slot = 0, last = args.stages - 1;
#pragma unroll 1
    for (int i = 0; i < product.count; ++i) {
      product.wait_for_k_block();
      product.multiply(accumulators, scales, i, slot);
      if (i > 0) {
        product.copy_weight(i - 1 + args.stages, last);
        product.copy_rows(i - 1 + args.stages, last);
      }
      commit_copies();
      last = slot;
      if (++slot == args.stages) slot = 0;
    }
    wait_for_copies<0>();
    __syncthreads();  // the sums take the ring's place
    add_warps(accumulators, warp_sums, block_sums, product.first_row, product.first_unit, args.units);
  }
}

// A vector of the rank's columns: the blocks' sums, added up in their order, and the bias. Each block of a cluster
// posts its share of the vectors.
template <typename Out>
__device__ inline void post_columns(const ColumnsArgs& args, const float* block_sums, const BlockRound& round) {
  const GatherArgs& gather = args.gather;
  const int tokens = static_cast<int>(gather.call.num_tokens), columns = args.units * kColumnUnit;
  const int first = static_cast<int>(blockIdx.x) / args.cluster * columns;
  const int cta = static_cast<int>(blockIdx.x) % args.cluster;
  for (int at = cta * kColumnsThreads + threadIdx.x; at < tokens * args.units; at += args.cluster * kColumnsThreads) {
    const int row = at / args.units, column = at % args.units * kColumnUnit;
    if (first + column >= args.own.count) continue;
    // All are asked for before the first is added: the way to another SM takes longer than all the rest.
    float4 sums[kMaxColumnsCluster][2];
#pragma unroll
    for (int other = 0; other < kMaxColumnsCluster; ++other) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (other < args.cluster) {
          sums[other][half] = cluster_load(block_sums + row * columns + column + 4 * half, other);
        }
      }
    }
    float values[8] = {};
#pragma unroll
    for (int other = 0; other < kMaxColumnsCluster; ++other) {
      if (other >= args.cluster) break;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float4 sum = sums[other][half];
        values[4 * half] += sum.x, values[4 * half + 1] += sum.y;
        values[4 * half + 2] += sum.z, values[4 * half + 3] += sum.w;
      }
    }
    const int64_t place = args.own.start + first + column;
    if (args.bias != nullptr) {
      float bias[8];
      unpack(bias, __ldg(reinterpret_cast<const uint4*>(static_cast<const Out*>(args.bias) + place)), Out{});
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] += bias[i];
    }
    const uint4 vector = pack(values, Out{});
#pragma unroll 1
    for (int rank = 0; rank < gather.team.world_size; ++rank) {
      post16(inbox_of(gather.team, rank, round.epoch) + row * gather.row_bytes + place * sizeof(Out), vector);
    }
  }
}

template <typename In, int kRowTiles>
__global__ void __launch_bounds__(kColumnsThreads, 1)
    qkv_a_proj_ag_columns_kernel(const __grid_constant__ ColumnsArgs args) {
  using Out = std::conditional_t<sizeof(In) == 1, __nv_bfloat16, In>;
  extern __shared__ __align__(128) char dynamic[];
  float* const warp_sums = reinterpret_cast<float*>(dynamic);
  float* const block_sums = reinterpret_cast<float*>(dynamic + args.ring_bytes);
  WarpProduct<In, kRowTiles> product(args, dynamic);
  for (int pass = 0; pass < product.num_passes(); pass += args.row_blocks) product.prefetch_weight(pass);
  pdl_wait();
  // Before anything else is looked at, which takes as long as the first operands are on their way.
  product.begin_pass(0);
  product.fill_ring();
  const GatherArgs& gather = args.gather;
  const BlockRound round = begin_op(gather.team, gather.call, gather.fingerprint, 1);
  if (!round.refused) signal_unfenced_to_peers(gather.team, round, 0, threadIdx.x);
  // A refused block multiplies, too: its cluster waits for it.
  multiply_columns(args, product, warp_sums, block_sums);
  cluster_arrive();
  cluster_wait();
  if (!round.refused) post_columns<Out>(args, block_sums, round);
  cluster_arrive_relaxed();  // others' sums have been read
  bool arrived = !round.refused && wait_for_peers(gather.team, gather.call, round, 0, threadIdx.x);
  arrived = __syncthreads_and(arrived);
  pdl_trigger();  // as in OneRow's
  if (arrived) arrived = finish_columns<Out, sizeof(In) == 1>(args, round);
  cluster_wait();
  if (__syncthreads_and(arrived)) return end_op(gather.team);
  poison_columns(args);
  end_faulted_op(gather.team, gather.call, round);
}

}  // namespace tpf
