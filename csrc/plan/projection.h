// How a projection and its gather are run: in one kernel, with which tiles; or a product first, and a gather after it.
#pragma once
#include "tiles.h"

namespace tpf {

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
