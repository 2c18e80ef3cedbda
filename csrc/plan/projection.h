// How a projection and its gather are run: in one kernel, with which tiles; or a product first, and a gather after it.
#pragma once
#include "tiles.h"

namespace tpf {

// Whether the kernels that norm q_a quantise it on the way, where the call asks for that: warps take 256 columns at
// once, and TMA copies scales of 16 bytes or more. All ranks alike. Else each quantises what it has gathered.
inline bool quantizes_q_a(const tpf_call& call) {
  return call.op == TPF_QKV_A_PROJ_AG_NORM_FP8 && call.dtype == TPF_E4M3 && call.group_size == kQuantizedColumns &&
         call.q_columns % (4 * kQuantizedColumns) == 0 && call.q_columns > 0;
}

struct ProjectionPlan {
  bool fused;
  bool few_rows;  // not fused, since with so few rows of a rank that takes less time
  TileKind tile;
  int tile_rows, tile_columns;
  int blocks;
  int64_t shared_bytes;
  int cluster;     // blocks that lie side by side, for both to ask for the same weights
  int row_blocks;  // of the rank that owns most rows; at least 1
  int column_tiles;
  int k_blocks;
};

// aligned: operands and outputs begin at a multiple of 16 bytes.
ProjectionPlan plan_projection(const tpf_call& call, bool aligned, const Limits& limits, const tpf_card& card);

}  // namespace tpf
