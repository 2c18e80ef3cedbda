// gather_columns_kernel: the gathering half of a projection of rows that all ranks have (TPF_COMPLETE). Each rank has
// multiplied its share of the columns, and pushes them into every rank's slot, where they form whole rows.
//
// A block pushes its columns of some rows, publishes, and waits for the peers' blocks of its number. The rows are then
// in this rank's own slot: it copies them to the outputs or, in qkv_a_proj_ag_norm, normalises their parts on the way.
// All ranks do that for all rows, of which there are few.
//
// A slot is written here by peers, which is as safe as it is by its owner: who pushes in round e has ended round e - 1,
// and so has met every rank after that rank had ended round e - 2, in which the slot was last read.
#pragma once
#include "all_gather_rows.cuh"

namespace tpf {

struct GatherColumnsArgs {
  GatherArgs gather;   // input: [num_tokens, this rank's columns]; the parts follow each other in a row of a slot
  int64_t own_offset;  // bytes of a row that come before this rank's
  int64_t own_bytes;
};

__device__ inline Rows rows_of_block(const GatherArgs& args) {
  const int64_t start = int64_t{blockIdx.x} * args.block_rows;
  return {start, max(min(int64_t{args.block_rows}, args.call.num_tokens - start), int64_t{0})};
}

// This rank's columns of the block's rows, into all ranks' slots.
__device__ inline void push_columns(const GatherColumnsArgs& args, uint32_t epoch, const Rows& rows) {
  const GatherArgs& gather = args.gather;
  const char* const input = gather.input + rows.start * args.own_bytes;
  const int64_t offset = rows.start * gather.row_bytes + args.own_offset;
  const int width = gather.vectors ? 16 : 1, pieces = static_cast<int>(args.own_bytes / width);
  for (int64_t at = threadIdx.x; at < rows.count * pieces; at += kGatherThreads) {
    const int64_t row = at / pieces, place = offset + row * gather.row_bytes + at % pieces * width;
    const char* const from = input + at * width;
    uint4 raw;
    if (gather.vectors) raw = load16(from);
#pragma unroll 1
    for (int rank = 0; rank < gather.team.world_size; ++rank) {
      char* const to = slot_of(gather.team, rank, epoch) + place;
      if (gather.vectors) {
        store16(to, raw);
      } else {
        *to = *from;
      }
    }
  }
}

// The block's rows, now whole in this rank's slot, go to the outputs. T: of the norms; void where there are none.
template <typename T>
__device__ inline void finish_rows(const GatherArgs& args, uint32_t epoch, const Rows& rows) {
  const char* const slot = slot_of(args.team, args.team.rank, epoch) + rows.start * args.row_bytes;
  if constexpr (std::is_void_v<T>) {
    char* const output = args.parts[0].output + rows.start * args.row_bytes;
    copy_piece(output, nullptr, slot, rows.count * args.row_bytes, threadIdx.x, kGatherThreads, args.vectors);
  } else {
    const int count = static_cast<int>(rows.count);
    for (int task = threadIdx.x / 32; task < args.num_parts * count; task += kGatherThreads / 32) {
      const GatherPart& part = args.parts[task / count];
      const int64_t row = task % count;
      finish_part<T>(args, part.output + (rows.start + row) * part.row_bytes, nullptr,
                     slot + row * args.row_bytes + part.row_offset, part);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kGatherThreads, 1)
    gather_columns_kernel(const __grid_constant__ GatherColumnsArgs args) {
  pdl_wait();
  const GatherArgs& gather = args.gather;
  const BlockRound round = begin_op(gather.team, gather.call, gather.fingerprint, 1);
  const Rows rows = rows_of_block(gather);
  bool arrived = !round.refused;  // the same in all threads
  if (arrived) {
    push_columns(args, round.epoch, rows);
    __syncthreads();
    publish_to_peers(gather.team, round, 0, threadIdx.x);
    arrived = wait_for_peers(gather.team, gather.call, round, 0, threadIdx.x);
  }
  if (__syncthreads_and(arrived)) {
    pdl_trigger();  // as in reduce_one_row
    finish_rows<T>(gather, round.epoch, rows);
    return end_op(gather.team);
  }
  for (int p = 0; p < gather.num_parts; ++p) {
    const GatherPart& part = gather.parts[p];
    poison(part.output + rows.start * part.row_bytes, rows.count * part.row_bytes, threadIdx.x, kGatherThreads);
  }
  end_faulted_op(gather.team, gather.call, round);
}

}  // namespace tpf
