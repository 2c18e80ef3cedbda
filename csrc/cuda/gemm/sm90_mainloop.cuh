// The main loop of a projection on sm_90: a warp fetches operands, and the scales of fp8, by TMA into a ring of stages,
// and two warp groups multiply them with wgmma. What it leaves in registers, sm90_epilogue.cuh stores.
//
// The seam: these two files, and the tiles that csrc/plan/tiles.h has for them, are what of a projection depends on the
// architecture. Another one brings a file beside each, with its own fetch_operands, Mainloop and store_tile.
#pragma once
#include <algorithm>
#include <bit>
#include <type_traits>

#include "../kernels/qkv_a_proj_ag.cuh"

namespace tpf {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// By a warp: the scales of a tile's rows and of its columns, kScaledColumns at a time, into shared memory. The
// multiplying warps would wait for them: these have no registers to ask for more than the next block of K's.
template <typename Tiles>
class ScaleFetcher {
 public:
  __device__ ScaleFetcher(const ProjectionArgs& args, Tile tile) : args_(args) {
    const int64_t rows = args.partition.rows(args.team.rank).count;
#pragma unroll
    for (int i = 0; i < kRowsOfLane; ++i) {
      const int64_t row = int64_t{tile.row_block} * Tiles::kRows + i * 32 + threadIdx.x % 32;
      rows_[i] = args.scale + min(row, rows - 1) * args.scale_row_stride;
    }
#pragma unroll
    for (int i = 0; i < kColumnsOfLane; ++i) {
      const int column = column_of<Tiles>(args, tile.column_tile, (i * 32 + threadIdx.x % 32) * Tiles::kScaledColumns);
      columns_[i] = args.weight_scale + min(column, args.call.columns - 1) / 128 * args.k_blocks;
    }
  }

  // Those of the next block of K, or of the next four. Each lane arrives on `full` when its own are there.
  __device__ void fetch(float* scales, const ScalePosition<Tiles>& position, uint32_t full) {
    if (!args_.scale_quads) {
      copy<4>(scales + position.first(), args_.scale_group_stride, 1);
    } else if (position.begins_quad()) {
      copy<16>(scales + position.first(), 4, 4);
    }
    arrive_when_copied(full);
  }

 private:
  static constexpr int kRowsOfLane = Tiles::kRows / 32, kColumnsOfLane = (Tiles::kColumnScales + 31) / 32;

  // kBytes of each row's and of each run of columns'; the next ones lie so many further.
  template <int kBytes>
  __device__ void copy(float* to, int64_t row_step, int column_step) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kRowsOfLane; ++i) {
      copy_async<kBytes>(to + 4 * (i * 32 + lane), rows_[i]);
      rows_[i] += row_step;
    }
#pragma unroll
    for (int i = 0; i < kColumnsOfLane; ++i) {
      const int column = i * 32 + lane;
      if (column < Tiles::kColumnScales) copy_async<kBytes>(to + 4 * (Tiles::kRows + column), columns_[i]);
      columns_[i] += column_step;
    }
  }

  const ProjectionArgs& args_;
  const float *rows_[kRowsOfLane], *columns_[kColumnsOfLane];
};

// By a warp.
template <typename Tiles>
__device__ inline void fetch_operands(const ProjectionArgs& args, ProjectionShared& shared, char* stages,
                                      float* scales) {
  constexpr int kElements = kSwizzleBytes / sizeof(typename Tiles::In);
  const uint32_t first_stage = uniform(shared_address(stages));
  const uint32_t full_barriers = uniform(shared_address(shared.full));
  const uint32_t empty_barriers = uniform(shared_address(shared.empty));
  RingPosition at;
  ScalePosition<Tiles> scales_at;
  // Blocks begin each wave of tiles together: left to themselves they drift apart, until what they share is no longer
  // in the L2 cache when the last of them wants it.
  AtomicRef<uint32_t, kDeviceScope> fetched(control(args.team.region[args.team.rank])->fetched);
  const int end = args.row_blocks * args.column_tiles, own = own_row_blocks(args, Tiles::kRows);
  for (int first = 0, index = blockIdx.x; index < end; first += gridDim.x, index += gridDim.x) {
    // Blocks that began after a fault fetch nothing.
    while (first > 0 && uniform(fetched.load(order::memory_order_relaxed)) < first &&
           !uniform(has_faulted(args.team))) {
    }
    const Tile tile = tile_of(index, args);
    ScaleFetcher<Tiles> scale_fetcher(args, tile);
    for (int k = 0; k < args.k_blocks && tile.row_block < own; ++k) {
      if (at.round > 0) barrier_wait(empty_barriers + at.stage * sizeof(uint64_t), (at.round - 1) & 1);
      const uint32_t stage = first_stage + at.stage * Tiles::kStageBytes;
      const uint32_t full = full_barriers + at.stage * sizeof(uint64_t);
      if (elect()) {
        barrier_expect(full, Tiles::kStageBytes);
        tensor_load(stage, &args.input_map, k * kElements, tile.row_block * Tiles::kRows, full);
#pragma unroll
        for (int column = 0; column < Tiles::kMainColumns; column += Tiles::kWeightBox) {
          tensor_load(stage + (Tiles::kRows + column) * kSwizzleBytes, &args.weight_map, k * kElements,
                      column_of<Tiles>(args, tile.column_tile, column), full);
        }
        if constexpr (Tiles::kTail > 0) {
          tensor_load(stage + (Tiles::kRows + Tiles::kMainColumns) * kSwizzleBytes, &args.tail_map, k * kElements,
                      column_of<Tiles>(args, tile.column_tile, Tiles::kMainColumns), full);
        }
      }
      __syncwarp();
      if constexpr (Tiles::kScaled) {
        scale_fetcher.fetch(scales, scales_at, full);
        scales_at.advance();
      }
      next_stage<Tiles>(at);
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0 && fetched.fetch_add(1, order::memory_order_relaxed) + 1 == end) {
      fetched.store(0, order::memory_order_relaxed);
    }
  }
}

// Its operands in the first stage.
struct Operands {
  uint64_t a, b;
};

template <typename Tiles>
__device__ inline Operands operands_of(const char* stages, GroupPart part) {
  const uint32_t first = shared_address(stages);
  return {operand(first + part.row * kSwizzleBytes), operand(first + (Tiles::kRows + part.column) * kSwizzleBytes)};
}

// 64 rows of 16-bit operands by all columns of a warp group's part.
template <typename In, int kAccumulators>
__device__ inline void multiply_columns(float (&accumulators)[kAccumulators], uint64_t a, uint64_t b) {
  constexpr int kFirst = first_product(kAccumulators);
  multiply(reinterpret_cast<float (&)[kFirst]>(accumulators), a, b, true, In{});
  if constexpr (kFirst < kAccumulators) {
    multiply(reinterpret_cast<float (&)[kAccumulators - kFirst]>(accumulators[kFirst]), a, columns_further(b, kFirst),
             true, In{});
  }
}

// Products of 16-bit operands: one stage's stay in flight. Like multiply_scaled_tile it does not give the last stage
// back, and returns its number.
template <typename Tiles>
__device__ inline int multiply_tile(const ProjectionArgs& args, ProjectionShared& shared, const Operands& operands,
                                    RingPosition& at, float (&accumulators)[Tiles::kMTiles][Tiles::kAccumulators]) {
  const bool arrives = threadIdx.x % 32 < kArrivingLanes;
  const uint32_t full_barriers = uniform(shared_address(shared.full));
  int last = 0;
#pragma unroll
  for (auto& m_tile : accumulators) {
#pragma unroll
    for (float& one : m_tile) one = 0;
    hold(m_tile);
  }
  for (int k = 0; k < args.k_blocks; ++k) {
    barrier_wait(full_barriers + at.stage * sizeof(uint64_t), at.round & 1);
    const uint64_t stage = at.stage * (Tiles::kStageBytes >> 4);
    product_fence();
#pragma unroll
    for (int step = 0; step < kSwizzleBytes / kProductBytes; ++step) {
#pragma unroll
      for (int m_tile = 0; m_tile < Tiles::kMTiles; ++m_tile) {
        multiply_columns<typename Tiles::In>(
            accumulators[m_tile], operands.a + stage + step * kOperandStep + m_tile * 64 * (kSwizzleBytes >> 4),
            operands.b + stage + step * kOperandStep);
      }
    }
    product_commit();
    product_wait<1>();
    if (k > 0 && arrives) barrier_arrive(&shared.empty[last]);
    last = at.stage;
    next_stage<Tiles>(at);
  }
  product_wait<0>();
#pragma unroll
  for (auto& m_tile : accumulators) hold(m_tile);
  return last;
}

// The row of a warp group's part that this thread's first accumulators belong to; the others' lies 8 below.
__device__ inline int row_of_thread() { return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4; }

// Multiplies a block of K of e4m3 operands and adds the products, times their scales, to the accumulators from the
// kFirst'th on. read() is called when operands and scales have been read.
template <typename Tiles, int kFirst, int kProducts, typename Read>
__device__ inline void multiply_and_promote(float (&products)[kProducts], float (&accumulators)[Tiles::kAccumulators],
                                            uint64_t a, uint64_t b, float upper, float lower, const float* column_scale,
                                            int group, const Read& read) {
  hold(products);
  if constexpr (Tiles::kPingPong) ping_pong_wait(group);
  product_fence();
#pragma unroll
  for (int step = 0; step < kSwizzleBytes / kProductBytes; ++step) {
    multiply(products, a + step * kOperandStep, b + step * kOperandStep, step > 0, __nv_fp8_e4m3{});
  }
  product_commit();
  constexpr int kFirstScale = kFirst * 2 / Tiles::kScaledColumns;
  constexpr int kScales = ((kFirst + kProducts) * 2 - 1) / Tiles::kScaledColumns + 1 - kFirstScale;
  float scale[kScales];
#pragma unroll
  for (int i = 0; i < kScales; ++i) scale[i] = column_scale[4 * (kFirstScale + i)];
  product_wait<0>();
  if constexpr (Tiles::kPingPong) ping_pong_signal(1 - group);
  hold(products);
  read();
#pragma unroll
  for (int i = 0; i < kProducts; i += 4) {  // 8 columns of two rows
    const float of_columns = scale[(kFirst + i) * 2 / Tiles::kScaledColumns - kFirstScale];
    const float high = upper * of_columns, low = lower * of_columns;
    float* to = accumulators + kFirst + i;
    to[0] = fmaf(products[i], high, to[0]);
    to[1] = fmaf(products[i + 1], high, to[1]);
    to[2] = fmaf(products[i + 2], low, to[2]);
    to[3] = fmaf(products[i + 3], low, to[3]);
  }
}

// Products of e4m3 operands with their scales. Where there are two, one is promoted before the other is begun: there
// are no registers for both. They are the same ones, by name and never undefined, and the larger comes last: or the
// compiler begins the second one sooner, and for want of registers waits after each of its steps.
template <typename Tiles>
__device__ inline int multiply_scaled_tile(const ProjectionArgs& args, ProjectionShared& shared,
                                           const Operands& operands, const float* scales, int group, RingPosition& at,
                                           ScalePosition<Tiles>& scales_at,
                                           float (&accumulators)[Tiles::kMTiles][Tiles::kAccumulators]) {
  static_assert(Tiles::kGroupRows == 64);
  // Sums of the product that comes before the last one, if there are two, and of the last one.
  constexpr int kFirst = first_product(Tiles::kAccumulators) % Tiles::kAccumulators,
                kLast = Tiles::kAccumulators - kFirst;
  const bool arrives = threadIdx.x % 32 < kArrivingLanes;
  const int row = group * Tiles::kGroupRows + row_of_thread();
#pragma unroll
  for (float& one : accumulators[0]) one = 0;
  const uint32_t full_barriers = uniform(shared_address(shared.full));
  int last = 0;
  for (int k = 0; k < args.k_blocks; ++k) {
    barrier_wait(full_barriers + at.stage * sizeof(uint64_t), at.round & 1);
    float products[kLast] = {};
    const uint64_t stage = at.stage * (Tiles::kStageBytes >> 4), a = operands.a + stage, b = operands.b + stage;
    const float* row_scale = scales + scales_at.first();
    const float* column_scale = row_scale + 4 * Tiles::kRows;
    const float upper = row_scale[4 * row], lower = row_scale[4 * (row + 8)];
    if constexpr (kFirst > 0) {
      multiply_and_promote<Tiles, 0>(reinterpret_cast<float (&)[kFirst]>(products), accumulators[0], a, b, upper, lower,
                                     column_scale, group, [] {});
    }
    const auto give_back = [&] {
      __syncwarp();  // all lanes have read their scales
      if (arrives && k + 1 < args.k_blocks) barrier_arrive(&shared.empty[at.stage]);
      last = at.stage;
      next_stage<Tiles>(at);
      scales_at.advance();
    };
    multiply_and_promote<Tiles, kFirst>(products, accumulators[0], a, columns_further(b, kFirst), upper, lower,
                                        column_scale, group, give_back);
  }
  return last;
}

// The main loop of one warp group: tile after tile.
template <typename Tiles>
class Mainloop {
 public:
  using Accumulators = float[Tiles::kMTiles][Tiles::kAccumulators];

  __device__ Mainloop(const ProjectionArgs& args, ProjectionShared& shared, const char* stages, const float* scales,
                      int group)
      : args_(args),
        shared_(shared),
        operands_(operands_of<Tiles>(stages, part_of<Tiles>(group))),
        scales_(scales),
        group_(group) {
    if (Tiles::kPingPong && group == 1) ping_pong_signal(0);
  }

  // Multiplies the next tile, and returns the stage that was multiplied last. It is the caller's until give_back.
  __device__ int multiply(Accumulators& accumulators) {
    if constexpr (Tiles::kScaled) {
      return multiply_scaled_tile<Tiles>(args_, shared_, operands_, scales_, group_, at_, scales_at_, accumulators);
    } else {
      return multiply_tile<Tiles>(args_, shared_, operands_, at_, accumulators);
    }
  }
  __device__ void give_back(int stage) {
    if (threadIdx.x % 32 < kArrivingLanes) barrier_arrive(&shared_.empty[stage]);
  }

 private:
  const ProjectionArgs& args_;
  ProjectionShared& shared_;
  const Operands operands_;
  const float* const scales_;
  const int group_;
  RingPosition at_;
  ScalePosition<Tiles> scales_at_;
};

#endif

}  // namespace tpf
