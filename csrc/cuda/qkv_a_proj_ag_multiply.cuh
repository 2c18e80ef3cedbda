// qkv_a_proj_ag_kernel's fetching warp and its multiplying warp groups.
#pragma once
#include <numeric>

#include "qkv_a_proj_ag.cuh"

namespace tpf {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <typename Tiles>
__device__ inline void fetch_operands(const ProjectionArgs& args, ProjectionShared& shared, char* stages) {
  constexpr int kElements = kSwizzleBytes / sizeof(typename Tiles::In);
  if (args.partition.rows(args.team.rank).count > 0) prefetch_map(&args.input_map);
  prefetch_map(&args.weight_map);
  RingPosition at;
  // Blocks begin each turn of tiles together: left to themselves they drift apart, until what they share is no longer
  // in the L2 cache when the last of them wants it.
  cuda::atomic_ref<uint32_t, cuda::thread_scope_device> fetched(control(args.team.region[args.team.rank])->fetched);
  const int end = args.row_blocks * args.column_tiles, own = own_row_blocks(args, Tiles::kRows);
  for (int first = 0, index = blockIdx.x; index < end; first += gridDim.x, index += gridDim.x) {
    // Blocks that began after a fault fetch nothing.
    while (fetched.load(cuda::memory_order_relaxed) < first && !has_faulted(args.team)) {
    }
    const Tile tile = tile_of<Tiles>(index, args);
    for (int k = 0; k < args.k_blocks && tile.row_block < own; ++k) {
      if (at.round > 0) barrier_wait(&shared.empty[at.stage], (at.round - 1) & 1);
      char* stage = stages + at.stage * Tiles::kStageBytes;
      uint64_t* full = &shared.full[at.stage];
      barrier_expect(full, Tiles::kStageBytes);
      tensor_load(stage, &args.input_map, k * kElements, tile.row_block * Tiles::kRows, full);
#pragma unroll
      for (int column = 0; column < Tiles::kColumns; column += Tiles::kWeightBox) {
        tensor_load(stage + (Tiles::kRows + column) * kSwizzleBytes, &args.weight_map, k * kElements,
                    tile.column_tile * Tiles::kColumns + column, full);
      }
      next_stage<Tiles>(at);
    }
    if (fetched.fetch_add(1, cuda::memory_order_relaxed) + 1 == end) fetched.store(0, cuda::memory_order_relaxed);
  }
}

// A warp group's share of a tile: where it begins in the tile.
struct Share {
  int row, column;
};

template <typename Tiles>
__device__ inline Share share_of(int group) {
  return Tiles::kByRows ? Share{group * Tiles::kGroupRows, 0} : Share{0, group * Tiles::kGroupColumns};
}

// Where a part of it begins in it.
template <typename Tiles>
__device__ constexpr Share place_of(int part) {
  return {part / Tiles::kAcross * 64, part % Tiles::kAcross * Tiles::kPartColumns};
}

// Its operands in the first stage.
struct Operands {
  uint64_t a, b;
};

template <typename Tiles>
__device__ inline Operands operands_of(const char* stages, Share share) {
  const uint32_t first = shared_address(stages);
  return {operand(first + share.row * kSwizzleBytes), operand(first + (Tiles::kRows + share.column) * kSwizzleBytes)};
}

// Products of 16-bit operands: one stage's stay in flight.
template <typename Tiles>
__device__ inline void multiply_tile(const ProjectionArgs& args, ProjectionShared& shared, const Operands& operands,
                                     RingPosition& at, float (&sums)[Tiles::kParts][Tiles::kSums]) {
  const bool leads = threadIdx.x % 32 == 0;
  int last = 0;
#pragma unroll
  for (auto& part : sums) {
#pragma unroll
    for (float& sum : part) sum = 0;
    hold(part);
  }
  for (int k = 0; k < args.k_blocks; ++k) {
    barrier_wait(&shared.full[at.stage], at.round & 1);
    const uint64_t stage = at.stage * (Tiles::kStageBytes >> 4);
    product_fence();
#pragma unroll
    for (int step = 0; step < kSwizzleBytes / kProductBytes; ++step) {
#pragma unroll
      for (int part = 0; part < Tiles::kParts; ++part) {
        const Share place = place_of<Tiles>(part);
        multiply(sums[part], operands.a + stage + step * kOperandStep + place.row * (kSwizzleBytes >> 4),
                 operands.b + stage + step * kOperandStep + place.column * (kSwizzleBytes >> 4), true,
                 typename Tiles::In{});
      }
    }
    product_commit();
    product_wait<1>();
    if (k > 0 && leads) barrier_arrive(&shared.empty[last]);
    last = at.stage;
    next_stage<Tiles>(at);
  }
  product_wait<0>();
#pragma unroll
  for (auto& part : sums) hold(part);
  if (leads) barrier_arrive(&shared.empty[last]);
}

// The row of a warp group's share that this thread's first sums belong to; the others' lies 8 below.
__device__ inline int row_of_thread() { return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4; }

// Products of e4m3 operands with their scales. Parts come one after the other: one set of registers holds their
// products until they are promoted.
template <typename Tiles>
__device__ inline void multiply_scaled_tile(const ProjectionArgs& args, ProjectionShared& shared,
                                            const Operands& operands, int group, RingPosition& at, Tile tile,
                                            float (&sums)[Tiles::kParts][Tiles::kSums]) {
  static_assert(Tiles::kGroupRows == 64);
  const bool leads = threadIdx.x % 32 == 0;
  const int64_t rows = args.partition.rows(args.team.rank).count;
  const int64_t row = int64_t{tile.row_block} * Tiles::kRows + group * Tiles::kGroupRows + row_of_thread();
  const float* row_scale = args.scale + min(row, rows - 1) * args.scale_row_stride;
  const int next_row = static_cast<int>((min(row + 8, rows - 1) - min(row, rows - 1)) * args.scale_row_stride);
  // Blocks of 128 columns that a tile lies in, at most. In the first one it begins at column `begin`, a multiple of
  // kStep.
  constexpr int kStep = std::gcd(Tiles::kColumns, 128), kBlocks = (Tiles::kColumns + 128 - kStep - 1) / 128 + 1;
  const int first_block = tile.column_tile * Tiles::kColumns / 128, begin = tile.column_tile * Tiles::kColumns % 128;
  const int last_block = (args.call.columns - 1) / 128;
  int blocks[kBlocks];
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) blocks[i] = min(first_block + i, last_block) * args.k_blocks;
  float upper = __ldg(row_scale), lower = __ldg(row_scale + next_row), scale[kBlocks];
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) scale[i] = __ldg(args.weight_scale + blocks[i]);
#pragma unroll
  for (auto& part : sums) {
#pragma unroll
    for (float& sum : part) sum = 0;
  }
  for (int k = 0; k < args.k_blocks; ++k) {
    barrier_wait(&shared.full[at.stage], at.round & 1);
    const uint64_t stage = at.stage * (Tiles::kStageBytes >> 4);
#pragma unroll
    for (int part = 0; part < Tiles::kParts; ++part) {
      const uint64_t b = operands.b + stage + place_of<Tiles>(part).column * (kSwizzleBytes >> 4);
      float products[Tiles::kSums];
      hold(products);
      product_fence();
#pragma unroll
      for (int step = 0; step < kSwizzleBytes / kProductBytes; ++step) {
        multiply(products, operands.a + stage + step * kOperandStep, b + step * kOperandStep, step > 0,
                 __nv_fp8_e4m3{});
      }
      product_commit();
      float scales[kBlocks][2];
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) scales[i][0] = upper * scale[i], scales[i][1] = lower * scale[i];
      if (part + 1 == Tiles::kParts && k + 1 < args.k_blocks) {
        row_scale += args.scale_group_stride;
        upper = __ldg(row_scale), lower = __ldg(row_scale + next_row);
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) scale[i] = __ldg(args.weight_scale + blocks[i] + k + 1);
      }
      product_wait<0>();
      hold(products);
      if (part + 1 == Tiles::kParts) {
        if (leads) barrier_arrive(&shared.empty[at.stage]);
        next_stage<Tiles>(at);
      }
#pragma unroll
      for (int j = 0; j < Tiles::kPartColumns / 8; ++j) {
        // These 8 columns lie in block `near` or, if the tile begins late enough, in `far`.
        const int column = (part * Tiles::kPartColumns + j * 8) / kStep * kStep;
        const int near = column / 128, far = (column + 128 - kStep) / 128;
        const bool is_far = begin + column >= far * 128;
        const float high = is_far ? scales[far][0] : scales[near][0], low = is_far ? scales[far][1] : scales[near][1];
        float* to = sums[part] + 4 * j;
        to[0] = fmaf(products[4 * j], high, to[0]);
        to[1] = fmaf(products[4 * j + 1], high, to[1]);
        to[2] = fmaf(products[4 * j + 2], low, to[2]);
        to[3] = fmaf(products[4 * j + 3], low, to[3]);
      }
    }
  }
}

// Of four lanes each has a word of four vectors; afterwards each has one whole vector, that of its own number.
__device__ inline void transpose_words(uint32_t (&words)[4]) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = (threadIdx.x & bit) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & bit) != 0) continue;
      const uint32_t sent = upper ? words[i] : words[i + bit];
      const uint32_t got = __shfl_xor_sync(0xffffffffu, sent, bit);
      words[i] = upper ? got : words[i];
      words[i + bit] = upper ? words[i + bit] : got;
    }
  }
}

// Rounds 64 rows of a warp group's sums to where `to` points, their first column and this thread's first row. `left`
// rows and `columns` columns are there from that point on.
template <typename Out, int kSums>
__device__ inline void store_sums(const ProjectionArgs& args, Out* to, const Out* bias, int64_t left, int columns,
                                  const float (&sums)[kSums]) {
  const int quarter = threadIdx.x % 4;
#pragma unroll
  for (int first = 0; first < kSums / 4; first += 4) {
    uint32_t upper[4] = {}, lower[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int j = first + i;
      if (j >= kSums / 4) break;
      const int column = j * 8 + quarter * 2;
      float added[2] = {};
      if (bias != nullptr && column < columns) {
        added[0] = static_cast<float>(bias[column]), added[1] = static_cast<float>(bias[column + 1]);
      }
      upper[i] = pack2(sums[4 * j] + added[0], sums[4 * j + 1] + added[1], Out{});
      lower[i] = pack2(sums[4 * j + 2] + added[0], sums[4 * j + 3] + added[1], Out{});
    }
    transpose_words(upper);
    transpose_words(lower);
    const int vector = first + quarter;
    if (vector >= kSums / 4 || vector * 8 >= columns) continue;
    if (left > 0) store16(to + vector * 8, {upper[0], upper[1], upper[2], upper[3]});
    if (left > 8) {
      store16(to + int64_t{8} * args.call.columns + vector * 8, {lower[0], lower[1], lower[2], lower[3]});
    }
  }
}

template <typename Tiles, typename Out, bool kNorm>
__device__ inline void multiply_tiles(const ProjectionArgs& args, const BlockRound& round, ProjectionShared& shared,
                                      int group, const char* stages) {
  constexpr bool kScaled = sizeof(typename Tiles::In) == 1;
  const Share share = share_of<Tiles>(group);
  const Operands operands = operands_of<Tiles>(stages, share);
  cuda::atomic_ref<uint32_t, cuda::thread_scope_block> stored(shared.stored);
  RingPosition at;
  for_tiles<Tiles>(args, [&](Tile tile) {
    float sums[Tiles::kParts][Tiles::kSums];
    if constexpr (kScaled) {
      multiply_scaled_tile<Tiles>(args, shared, operands, group, at, tile, sums);
    } else {
      multiply_tile<Tiles>(args, shared, operands, at, sums);
    }
    const int64_t row = int64_t{tile.row_block} * Tiles::kRows + share.row + row_of_thread();
    const int column = tile.column_tile * Tiles::kColumns + share.column;
    const int64_t rows = args.partition.rows(args.team.rank).count;
    const Out* bias = static_cast<const Out*>(args.bias);
#pragma unroll
    for (int part = 0; part < Tiles::kParts; ++part) {
      const int64_t first_row = row + place_of<Tiles>(part).row;
      const int first = column + place_of<Tiles>(part).column;
      store_sums(args, rows_at<Out, kNorm>(args, round) + first_row * args.call.columns + first,
                 bias == nullptr ? nullptr : bias + first, rows - first_row, args.call.columns - first, sums[part]);
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) stored.fetch_add(1, cuda::memory_order_release);
  });
}

#endif

}  // namespace tpf
