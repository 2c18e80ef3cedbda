// How a projection of few rows that every rank has is run: the product of its share of the weight's rows and the gather
// of columns in one kernel, qkv_a_proj_ag_columns_kernel.
#pragma once
#include "card.h"

namespace tpf {

constexpr int kColumnsWarps = 8;  // of a block; each takes every so many K blocks
constexpr int kMaxColumnsCluster = 8;
constexpr int kColumnUnit = 8;                               // columns of one tensor-core instruction
constexpr int kColumnUnits = 8;                              // that a warp has accumulators of
constexpr uint32_t kMostColumnsHidden = 1u << 30;            // 32 bits count all elements of a row
constexpr int kKBlockBytes = 64;                             // of a row along K, of which a lane has 16
constexpr int kSumsStride = kColumnUnits * kColumnUnit + 8;  // floats of a row of a warp's sums: no bank conflicts
constexpr int kMostColumnRows = 64;
constexpr int kMostNormedColumns = 8 * 32 * 8;  // that a warp holds, of 16 bits

struct ColumnsPlan {
  bool serves;
  int blocks;
  int cluster;                     // blocks that share out K for the same columns
  int units;                       // of kColumnUnit columns, of a cluster, at most
  int row_tiles;                   // of 16 rows, that a warp has accumulators of: 1, 2 or 4
  int row_blocks;                  // of so many, one after the other
  int stages;                      // of the ring that operands go through
  int stage_units, stage_vectors;  // of 16 bytes, of a thread in a stage: the weight's, and all
  int64_t ring_bytes, shared_bytes;
};

// aligned: operands and outputs begin at a multiple of 16 bytes.
ColumnsPlan plan_columns(const tpf_call& call, bool aligned, const Limits& limits, const tpf_card& card);

}  // namespace tpf
