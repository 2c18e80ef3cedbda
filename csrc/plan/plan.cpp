// tpf_plan_call: what a call would launch, told without a card.
#include <cstring>
#include <limits>

#include "columns.h"
#include "gather.h"
#include "projection.h"
#include "reduce.h"

namespace {

// Cards by the names that their users have for them. Shared memory is what one block may have. How many
// SMs no cluster of eight can have differs from card to card: 12 of 132 on an H200, of the others as few as can be.
constexpr struct {
  const char* name;
  tpf_card card;
} kCards[] = {
    {"A100", {80, 108, 0, 166912, 0}},    {"H20", {90, 78, 72, 232448, 1}},
    {"H100", {90, 132, 120, 232448, 1}},  {"H200", {90, 132, 120, 232448, 1}},
    {"B200", {100, 148, 144, 232448, 0}}, {"RTX PRO 6000", {120, 188, 176, 101376, 0}},
};

bool projects(const tpf_call& call) {
  return call.op == TPF_QKV_A_PROJ_AG || call.op == TPF_QKV_A_PROJ_AG_FP8 || tpf::is_normed(call);
}
// All others, so that one more needs no word here.
bool reduces(const tpf_call& call) {
  return call.op != TPF_ALL_GATHER_ROWS && call.op != TPF_BARRIER && !projects(call);
}

// Whether there can be such a call: 32 bits count rows and columns, and rows that are added up are whole vectors.
bool can_be(const tpf_call& call, const tpf_team& team) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  const bool sums = call.dtype <= TPF_F32 && call.hidden_size > 0 && call.hidden_size % 8 == 0;
  return call.dtype <= TPF_U8 && call.num_tokens >= 0 && call.num_tokens <= kMost && call.hidden_size <= kMost &&
         call.columns <= kMost && (sums || !reduces(call)) && (call.columns > 0 || !projects(call)) &&
         int64_t{call.q_columns} + call.kv_columns <= call.columns && team.world_size >= 1 &&
         team.world_size <= TPF_MAX_RANKS && team.slot_bytes >= 0;
}

void plan_of_gather(tpf_plan* plan, const tpf_call& call, int64_t columns, tpf_dtype dtype, const tpf::Limits& limits,
                    const tpf_card& card) {
  const int64_t row_bytes = columns * tpf::bytes_of(dtype);
  const bool of_columns = call.op != TPF_ALL_GATHER_ROWS && (call.variant & TPF_COMPLETE) != 0;
  const tpf::GatherPlan gather =
      of_columns ? tpf::plan_gather_columns(call.num_tokens, limits)
                 : tpf::plan_gather(call.num_tokens, row_bytes, row_bytes % tpf::kVectorBytes == 0, limits, card);
  plan->blocks = gather.blocks;
  plan->threads = tpf::kGatherThreads;
  plan->cluster = 1;
  plan->body = gather.bulk ? TPF_BULK : TPF_DIRECT;
  plan->shared_bytes = gather.shared_bytes;
  plan->chunk_rows = gather.chunk_rows;
  plan->chunks = gather.num_chunks;
}

void plan_of_projection(tpf_plan* plan, const tpf_call& call, const tpf::Limits& limits, const tpf_card& card) {
  if (const tpf::ColumnsPlan columns = tpf::plan_columns(call, true, limits, card); columns.serves) {
    plan->body = TPF_COLUMNS;
    plan->blocks = columns.blocks;
    plan->threads = 32 * tpf::kColumnsWarps;
    plan->cluster = columns.cluster;
    plan->shared_bytes = columns.shared_bytes;
    plan->chunk_rows = 16 * columns.row_tiles;
    plan->chunks = columns.row_blocks;
    plan->tile_columns = tpf::kColumnUnit * columns.units;
    return;
  }
  const tpf::ProjectionPlan projection = tpf::plan_projection(call, true, limits, card);
  plan->few_rows = projection.few_rows;
  if (!projection.fused) return plan_of_gather(plan, call, call.columns, tpf::latent_dtype(call), limits, card);
  plan->blocks = projection.blocks;
  plan->threads = tpf::kProjectionThreads;
  plan->cluster = projection.cluster;
  plan->shared_bytes = projection.shared_bytes;
  plan->body = TPF_TILES;
  plan->chunk_rows = projection.tile_rows;
  plan->tile_columns = projection.tile_columns;
  plan->chunks = projection.row_blocks;
}

bool plan_of_reduction(tpf_plan* plan, const tpf_call& call, const tpf::Limits& limits, const tpf_card& card) {
  tpf::ReducePlan reduce;
  if (!tpf::plan_reduce(&reduce, call, limits, card)) return false;
  switch (reduce.body) {
    case tpf::Body::kOneRow:
      plan->body = TPF_ONE_ROW;
      break;
    case tpf::Body::kBulk:
      plan->body = TPF_BULK;
      break;
    case tpf::Body::kDirect:
      plan->body = TPF_DIRECT;
      break;
    case tpf::Body::kAllRows:
      plan->body = TPF_ALL_ROWS;
  }
  plan->blocks = reduce.blocks;
  plan->threads = reduce.threads;
  plan->cluster = reduce.cluster;
  plan->shared_bytes = reduce.shared_bytes;
  plan->vectors = reduce.vectors;
  plan->chunk_rows = reduce.chunk_rows;
  plan->chunks = reduce.num_chunks;
  plan->stages = reduce.stages;
  if (reduce.posted) plan->source = -1;
  if (call.op == TPF_RS_RMSNORM_AG) plan->rounds = tpf::rounds_of_gather(reduce.body, reduce.ranks);
  if (reduce.body == tpf::Body::kOneRow || reduce.body == tpf::Body::kAllRows) plan->ranks = reduce.ranks;
  return true;
}

}  // namespace

tpf_status tpf_card_named(tpf_card* card, const char* name) {
  for (const auto& known : kCards) {
    if (std::strcmp(known.name, name) != 0) continue;
    *card = known.card;
    return TPF_OK;
  }
  return TPF_UNSUPPORTED;
}

tpf_status tpf_plan_call(tpf_plan* plan, const tpf_call* call, const tpf_team* team, const tpf_card* card) {
  *plan = {};
  if (!can_be(*call, *team)) return TPF_UNSUPPORTED;
  const tpf::Limits limits = tpf::limits_of(*team);
  plan->source = call->source;
  plan->rounds = 1;
  if (call->op == TPF_ALL_GATHER_ROWS) {
    plan_of_gather(plan, *call, call->hidden_size, static_cast<tpf_dtype>(call->dtype), limits, *card);
    return TPF_OK;
  }
  if (projects(*call)) {
    plan_of_projection(plan, *call, limits, *card);
    return TPF_OK;
  }
  return reduces(*call) && plan_of_reduction(plan, *call, limits, *card) ? TPF_OK : TPF_UNSUPPORTED;
}
