// How all_gather_rows, and the gathering half of a projection, are run: all_gather_rows_kernel's body and grid.
#pragma once
#include "card.h"

namespace tpf {

constexpr int kGatherThreads = 512;
constexpr int kGatherChunks = 8;            // of a block, at most
constexpr int kGatherItemBytes = 16 << 10;  // of one bulk copy, at most

struct GatherPlan {
  bool bulk;  // TMA moves the peers' rows through shared memory; else all threads copy
  int blocks;
  int64_t shared_bytes;
  int block_rows;  // of a share, for one block, at most
  int chunk_rows, num_chunks;
};

// aligned: everything begins at, and is, whole vectors of 16 bytes. Who copies what and when is the same on all ranks;
// the body may differ, since addresses do.
GatherPlan plan_gather(int64_t num_tokens, int64_t row_bytes, bool aligned, const Limits& limits, const tpf_card& card);

// Where a rank's scales begin in its slot, behind as many quantised rows as a rank has at most.
inline int64_t staged_scales_offset(int64_t most_rows, int64_t hidden_size) {
  return (most_rows * hidden_size + kVectorBytes - 1) / kVectorBytes * kVectorBytes;
}

// Whether quantised rows and their scales are gathered in one round: where both are whole vectors, and fit a slot.
inline bool gathers_scales_too(int64_t num_tokens, int64_t hidden_size, int64_t groups, int world_size,
                               int64_t slot_bytes) {
  const int64_t most_rows = partition_of(num_tokens, world_size).largest();
  const int64_t scale_bytes = groups * static_cast<int64_t>(sizeof(float));
  return hidden_size % kVectorBytes == 0 && scale_bytes % kVectorBytes == 0 &&
         staged_scales_offset(most_rows, hidden_size) + most_rows * scale_bytes <= slot_bytes;
}

// Of columns of rows that all ranks have: gather_columns_kernel's grid.
GatherPlan plan_gather_columns(int64_t num_tokens, const Limits& limits);

}  // namespace tpf
