// The second half of qkv_a_proj_ag_columns_kernel: each rank takes whole rows, of which all ranks have posted columns,
// from its inbox. And what both halves are given.
#pragma once
#include "../../plan/columns.h"
#include "../comm/inbox.cuh"
#include "all_gather_rows.cuh"

namespace tpf {

constexpr int kColumnsThreads = 32 * kColumnsWarps;

struct ColumnsArgs {
  GatherArgs gather;   // its input is not looked at
  const void* input;   // [num_tokens, hidden]
  const void* weight;  // [columns, hidden]
  const void* bias;
  const float* scale;  // of fp8
  int64_t scale_row_stride, scale_group_stride;
  const float* weight_scale;
  float* q_a_scale;  // of e4m3 q_a; else null
  int64_t q_a_scale_row_stride, q_a_scale_group_stride;
  Rows own;       // columns
  int32_t units;  // of a cluster
  int32_t cluster;
  int32_t row_blocks;                  // of 16 * kRowTiles rows
  int32_t stages;                      // of the ring
  int32_t stage_units, stage_vectors;  // of a stage: the weight's vectors of a thread, and all
  int32_t ring_bytes;
};

// Whose columns these are.
__device__ inline int owner_of_column(const ColumnsArgs& args, int64_t column) {
  const int world_size = args.gather.team.world_size;
  int rank = 0;
  while (rank + 1 < world_size && column >= latent_columns_of(args.gather.call, rank + 1, world_size).start) ++rank;
  return rank;
}

// Up to kCount vectors of a part of a row, 512 bytes apart, from the inbox; they are 0 there again afterwards.
template <typename Out, int kCount>
__device__ inline bool take_columns(const ColumnsArgs& args, const BlockRound& round, uint4 (&vectors)[kCount],
                                    int64_t row, const GatherPart& part, int begin) {
  const GatherArgs& gather = args.gather;
  char* const from =
      inbox_of(gather.team, gather.team.rank, round.epoch) + row * gather.row_bytes + part.row_offset + begin;
  const auto comes = [&](int v) { return begin + v * 512 < part.row_bytes; };
#pragma unroll
  for (uint4& vector : vectors) vector = {};
  const bool arrived = take_posted(
      vectors, gather.team, gather.call, round, [&] { return from; }, [] { return 512; }, comes,
      [&](int v) { return owner_of_column(args, (part.row_offset + begin + v * 512) / int64_t{sizeof(Out)}); });
#pragma unroll
  for (int v = 0; v < kCount; ++v) {
    if (arrived && comes(v)) store16(from + v * 512, {});
  }
  return arrived;
}

// run(part, row) for the parts of rows that this warp finishes.
template <typename Run>
__device__ inline void for_parts(const GatherArgs& args, Run&& run) {
  const int tokens = static_cast<int>(args.call.num_tokens), warps = static_cast<int>(gridDim.x) * kColumnsWarps;
  // The first parts of all rows, which take longest, in as many blocks as there are.
  for (int task = threadIdx.x / 32 * gridDim.x + blockIdx.x; task < args.num_parts * tokens; task += warps) {
    run(args.parts[task / tokens], task % tokens);
  }
}

// Whether a part leaves as e4m3, with scales: q_a, which is the first.
__device__ inline bool is_quantized(const ColumnsArgs& args, const GatherPart& part) {
  return args.q_a_scale != nullptr && part.row_offset == 0;
}

__device__ inline float& scale_of(const ColumnsArgs& args, int64_t row, int group) {
  return args.q_a_scale[row * args.q_a_scale_row_stride + group * args.q_a_scale_group_stride];
}

template <typename Out, bool kScaled>
__device__ inline bool finish_columns(const ColumnsArgs& args, const BlockRound& round) {
  const GatherArgs& gather = args.gather;
  const int lane = threadIdx.x % 32;
  bool arrived = true;
  for_parts(gather, [&](const GatherPart& part, int64_t row) {
    char* const to = part.output + row * part.row_bytes;
    const auto take = [&](HeldPart<Out>& held) {
      arrived = take_columns<Out>(args, round, held.raw, row, part, lane * 16) && arrived;
    };
    if constexpr (kScaled) {
      if (is_quantized(args, part)) {
        uint8_t* const q = reinterpret_cast<uint8_t*>(part.output) + row * gather.call.q_columns + lane * 8;
        const bool rounded = (gather.call.variant & TPF_ROUND_SCALES) != 0;
        norm_held_part<Out>(gather, part, take, [&](int v, uint4 vector) {
          const float scale = quantize_vector(q + v * 256, vector, rounded);
          if (lane % 16 == 0) scale_of(args, row, 2 * v + lane / 16) = scale;
        });
        return;
      }
    }
    if (part.weight != nullptr) {
      norm_held_part<Out>(gather, part, take, [&](int v, uint4 vector) { store16(to + lane * 16 + v * 512, vector); });
      return;
    }
    for (int begin = lane * 16; begin < part.row_bytes; begin += 4 * 512) {
      uint4 vectors[4];
      arrived = take_columns<Out>(args, round, vectors, row, part, begin) && arrived;
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        if (begin + v * 512 < part.row_bytes) store16(to + begin + v * 512, vectors[v]);
      }
    }
  });
  return arrived;
}

// Instead of that, after a fault.
__device__ inline void poison_columns(const ColumnsArgs& args) {
  const int lane = threadIdx.x % 32;
  for_parts(args.gather, [&](const GatherPart& part, int64_t row) {
    const bool quantized = is_quantized(args, part);
    const int64_t bytes = quantized ? args.gather.call.q_columns : part.row_bytes;
    poison(part.output + row * bytes, bytes, lane, 32);
    const int groups = quantized ? args.gather.call.q_columns / kQuantizedColumns : 0;
    for (int group = lane; group < groups; group += 32) {
      poison(reinterpret_cast<char*>(&scale_of(args, row, group)), sizeof(float), 0, 1);
    }
  });
}

}  // namespace tpf
