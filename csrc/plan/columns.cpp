#include "columns.h"

namespace tpf {

ColumnsPlan plan_columns(const tpf_call& call, bool aligned, const Limits& limits, const tpf_card& card) {
  ColumnsPlan plan = {};
  const bool scaled = call.dtype == TPF_E4M3;
  const int64_t row_bytes = call.hidden_size * bytes_of(static_cast<tpf_dtype>(call.dtype));
  const uint32_t rest = call.columns - call.q_columns - call.kv_columns;
  const bool shares = shares_card(limits.max_ctas, card);
  const Fitted& fitted = fitted_to(card);
  const int64_t columns = latent_columns_of(call, 0, limits.world_size).count;  // of the largest share, which decides
  const int64_t products = scaled ? fitted.own_card_fp8_column_products : fitted.own_card_column_products;
  const int64_t most_rows = shares ? fitted.shared_card_column_rows
                                   : std::min<int64_t>(kMostColumnRows, products / std::max<int64_t>(columns, 1));
  const int64_t posted = call.num_tokens * call.columns * bytes_of(latent_dtype(call));
  if ((call.variant & TPF_COMPLETE) == 0 || !aligned || call.dtype == TPF_F32 || (scaled && !has_tma(card)) ||
      call.num_tokens > most_rows || call.hidden_size > kMostColumnsHidden || row_bytes % 16 != 0 ||
      call.columns % 8 != 0 || call.q_columns % 8 != 0 || call.kv_columns % 8 != 0 || rest % 8 != 0 ||
      call.q_columns > kMostNormedColumns || call.kv_columns > kMostNormedColumns ||
      posted > inbox_bytes(limits.slot_bytes)) {
    return plan;
  }
  const int units = static_cast<int>((columns + kColumnUnit - 1) / kColumnUnit);
  const int most = std::min(limits.max_ctas, card.sm_count);
  const int64_t k_blocks = (row_bytes + kKBlockBytes - 1) / kKBlockBytes;
  // Of fp8, which is multiplied into accumulators of its own for each scale, there are the registers for two.
  plan.row_tiles = call.num_tokens <= 16 ? 1 : call.num_tokens <= 32 || scaled ? 2 : 4;
  plan.row_blocks = std::max(1, static_cast<int>((call.num_tokens + 16 * plan.row_tiles - 1) / (16 * plan.row_tiles)));
  // What a block reads of the weight and of the rows decides, and how often it begins anew and meets others. All blocks
  // of all ranks must be on their cards at once, since each waits for what the others multiply. Not all SMs are in a
  // cluster of more than two, and cards of a group may differ in how many: kUnclustered are more than any lacks. Where
  // ranks share a card, such clusters would have to find room beside the others'.
  const int64_t rows = (call.num_tokens + 7) / 8 * 8;
  const int largest = !has_tma(card) ? 1 : shares ? 2 : kMaxColumnsCluster;
  int64_t least = 0;
  for (int cluster = 1; cluster <= largest; cluster *= 2) {
    const int sms = cluster > 2 ? std::min(most - kUnclustered, card.cluster_sms) : most;
    const int groups = std::min(sms / cluster, units);
    if (groups <= 0 || (cluster > 1 && k_blocks < cluster * kColumnsWarps) ||
        !cluster_fits(limits, card, cluster, cluster * groups)) {
      break;
    }
    const int of_group = (units + groups - 1) / groups;
    const int passes = (of_group + kColumnUnits - 1) / kColumnUnits;
    const int64_t cost = (of_group * kColumnUnit + passes * rows) * ((k_blocks + cluster - 1) / cluster) +
                         passes * plan.row_blocks * fitted.column_pass + cluster * fitted.column_cluster;
    if (plan.cluster != 0 && cost >= least) continue;
    least = cost;
    plan.cluster = cluster;
    plan.units = of_group;
    plan.blocks = (units + of_group - 1) / of_group * cluster;
  }
  // The warps' sums take the ring's place; the block's sums, of all passes, have one of their own.
  const int64_t block_rows = 16 * plan.row_tiles;
  const int64_t warp_sums = block_rows * kColumnsWarps * kSumsStride * sizeof(float);
  const int64_t sums = block_rows * plan.row_blocks * plan.units * kColumnUnit * sizeof(float);
  plan.stage_units = std::min(plan.units, kColumnUnits);
  plan.stage_vectors = plan.stage_units + std::min(2 * plan.row_tiles, static_cast<int>((call.num_tokens + 7) / 8));
  const int64_t stage = plan.stage_vectors * kColumnsWarps * 32 * kVectorBytes;
  for (const int stages : {8, 6, 4, 3}) {
    plan.stages = stages;
    plan.ring_bytes = std::max(stages * stage, warp_sums);
    plan.shared_bytes = plan.ring_bytes + sums;
    plan.serves = plan.cluster != 0 && plan.shared_bytes + kStaticSharedBytes <= card.shared_bytes;
    if (plan.serves) break;
  }
  return plan;
}

}  // namespace tpf
