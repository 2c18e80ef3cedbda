#include "gather.h"

namespace tpf {

GatherPlan plan_gather(int64_t num_tokens, int64_t row_bytes, bool aligned, const Limits& limits,
                       const tpf_card& card) {
  const RowsOfBlocks shared_out = share_out(partition_of(num_tokens, limits.world_size).largest(), limits.max_ctas);
  row_bytes = std::max<int64_t>(row_bytes, 1);
  const int64_t rows_of_chunk = std::max<int64_t>((shared_out.rows + kGatherChunks - 1) / kGatherChunks,
                                                  fitted_to(card).gather_chunk_bytes / row_bytes);
  GatherPlan plan = {};
  plan.blocks = shared_out.blocks;
  plan.block_rows = shared_out.rows;
  plan.chunk_rows = static_cast<int>(std::min<int64_t>(shared_out.rows, rows_of_chunk));
  plan.num_chunks = std::max(1, (shared_out.rows + plan.chunk_rows - 1) / std::max(1, plan.chunk_rows));
  // All threads of a block copy a few items faster than TMA does one after the other; many, too, where the grid has all
  // SMs of the card. Where ranks share the SMs, TMA is faster.
  plan.bulk =
      has_tma(card) && aligned && shares_card(plan.blocks, card) && plan.block_rows * row_bytes > 2 * kGatherItemBytes;
  plan.shared_bytes = plan.bulk ? int64_t{kCopierStages} * kGatherItemBytes : 0;
  return plan;
}

GatherPlan plan_gather_columns(int64_t num_tokens, const Limits& limits) {
  const RowsOfBlocks shared_out = share_out(num_tokens, limits.max_ctas);
  GatherPlan plan = {};
  plan.blocks = shared_out.blocks;
  plan.block_rows = plan.chunk_rows = shared_out.rows;
  plan.num_chunks = 1;
  return plan;
}

}  // namespace tpf
