#include "reduce.h"

namespace tpf {
namespace {

struct Planner {
  const tpf_call& call;
  const Limits& limits;
  const tpf_card& card;
  const int element_bytes = static_cast<int>(bytes_of(static_cast<tpf_dtype>(call.dtype)));
  const int64_t row_bytes = call.hidden_size * int64_t{element_bytes};
  const int64_t rows = partition_of(call.num_tokens, limits.world_size).largest();
  const bool gathers = call.op == TPF_RS_RMSNORM_AG;
  const bool quantizes_all = call.op == TPF_RS_RMSNORM_FP8 && (call.variant & TPF_GATHERED) != 0;
  const int warps = static_cast<int>((row_bytes / kVectorBytes + 31) / 32);  // that hold a vector of a row a thread

  bool is_staged() const { return call.source < 0 && limits.world_size > 1 && (call.variant & TPF_COMPLETE) == 0; }
  // Whether the rows that a rank is sent to be added up fit its inbox; twice: and those to be gathered, behind them.
  bool fits_inbox(int times = 1) const {
    return times * limits.world_size * rows * row_bytes <= inbox_bytes(limits.slot_bytes);
  }
  bool has_one_row(int compiled_for) const {
    return compiled_for_one_row(compiled_for, element_bytes, gathers, card.architecture);
  }
  // What kOneRow is to be compiled for. Where ranks share a card, posting normalised rows instead of fetching them is
  // more to be written and read by its SMs.
  int ranks_of_one_row() const {
    const int64_t posted = limits.world_size * (limits.world_size - 1) * call.num_tokens * row_bytes;
    const bool fetches =
        !fits_inbox(2) || (shares_card(limits.max_ctas, card) && posted > fitted_to(card).shared_card_posted);
    return (gathers && fetches) || !has_one_row(limits.world_size) ? 0 : limits.world_size;
  }

  // Whether every rank adds up all rows, in one synchronisation: as long as what every rank is sent then takes less
  // time than a second one, or than a kernel that quantises.
  bool takes_all_rows() const {
    const int64_t bytes = limits.world_size * call.num_tokens * row_bytes;
    if ((!gathers && !quantizes_all) || !adds_up_all_rows(card.architecture) || (call.variant & TPF_COMPLETE) != 0 ||
        bytes + call.num_tokens * row_bytes > inbox_bytes(limits.slot_bytes)) {
      return false;
    }
    const Fitted& fitted = fitted_to(card);
    if (quantizes_all) {
      return std::max(1, limits.world_size - 1) * call.num_tokens * row_bytes <= fitted.quantized_all_rows;
    }
    return bytes <= (shares_card(limits.max_ctas, card) ? fitted.shared_card_all_rows : fitted.own_card_all_rows);
  }

  // Whether a block's few rows are all posted, where a rank has a card to itself: links are kept busy from the
  // beginning.
  bool posts_few(int rows_of_block) const {
    return has_tma(card) && takes_several_rows(ranks_of_one_row()) && (call.variant & TPF_COMPLETE) == 0 &&
           !shares_card(limits.max_ctas, card) && rows_of_block <= fitted_to(card).own_card_posted_rows && fits_inbox();
  }

  // As many blocks for a row as there may be, down to four warps each. What a small call waits for most is the way of
  // its rows through the SMs.
  int cluster_of_row(int rows_at_once) const {
    int cluster = 1;
    while (has_tma(card) && cluster < kMaxCluster && 2 * cluster * rows_at_once <= limits.max_ctas &&
           cluster_fits(limits, card, 2 * cluster, 2 * cluster * rows_at_once) && warps >= 8 * cluster) {
      cluster *= 2;
    }
    return cluster;
  }

  // Unless it takes more threads than the body may have for each to hold so many vectors of a row.
  bool takes(ReducePlan* plan, Body body, int vectors, int blocks) const {
    const int threads = (warps + vectors * plan->cluster - 1) / (vectors * plan->cluster) * 32;
    if (threads > most_threads(body, element_bytes, has_tma(card))) return false;
    plan->body = body;
    plan->vectors = vectors;
    plan->blocks = blocks * plan->cluster;
    plan->ranks = body == Body::kOneRow ? ranks_of_one_row() : has_one_row(limits.world_size) ? limits.world_size : 0;
    plan->threads = threads + (body == Body::kBulk ? kHelperThreads : 0);
    return true;
  }

  // Nothing but the chunks in which a block's rows are staged and gathered.
  void begin(ReducePlan* plan, int cluster, const RowsOfBlocks& shared_out) const {
    *plan = {};
    plan->cluster = cluster;
    // Staged rows that fit no inbox are for the bodies that stage in slots, one row a block or not. Between cards,
    // gathering a chunk takes long enough for fewer and larger ones to be faster.
    int least = fits_inbox() || !is_staged() ? std::min(shared_out.rows, 2) : 2;
    if (gathers && !is_staged() && !shares_card(shared_out.blocks * cluster, card)) {
      least = std::min(shared_out.rows, fitted_to(card).gathered_rows_of_chunk);
    }
    plan->chunk_rows = std::max((shared_out.rows + kMaxChunks - 1) / kMaxChunks, least);
    plan->num_chunks = std::max(1, (shared_out.rows + plan->chunk_rows - 1) / std::max(1, plan->chunk_rows));
  }

  // `cluster` blocks share a row. Where the ring holds every source's version of at least one row, or the block's part
  // of it: fetch_rows relies on that.
  bool takes_bulk(ReducePlan* plan, int cluster) const {
    // All clusters run at once: on a card of its own, too, some SMs are in none of more than two.
    const bool alone = !shares_card(limits.max_ctas, card);
    const int most = limits.max_ctas - (cluster > 2 && alone ? kUnclustered : 0);
    const RowsOfBlocks shared_out = share_out(rows, std::max(1, most / cluster));
    if (!has_tma(card) || cluster > most || !cluster_fits(limits, card, cluster, cluster * shared_out.blocks)) {
      return false;
    }
    begin(plan, cluster, shared_out);
    if (is_staged() && shared_out.rows > 1 && shared_out.rows <= kMaxChunks) {
      // A block's few rows are staged one by one: the first is added up while the next one is on its way.
      plan->chunk_rows = 1;
      plan->num_chunks = shared_out.rows;
    }
    const int copied = gathers || (call.source < 0 && limits.world_size > 1) ? kCopierStages : 0;
    if (!takes(plan, Body::kBulk, 2, shared_out.blocks) && !takes(plan, Body::kBulk, 3, shared_out.blocks))
      return false;
    const int64_t part = std::min<int64_t>(row_bytes, (plan->threads - kHelperThreads) * plan->vectors * kVectorBytes);
    if ((cluster - 1) * part >= row_bytes) return false;  // whole warps: the last blocks would have nothing of a row
    const int64_t buffers = (card.shared_bytes - kStaticSharedBytes) / part - copied, least = limits.world_size + 1;
    if (buffers < least) return false;
    const int64_t wanted = std::max(least, fitted_to(card).ring_bytes / part);
    plan->stages = static_cast<int>(std::min({int64_t{kMaxStages}, buffers, wanted}));
    plan->shared_bytes = (copied + plan->stages) * part;
    return true;
  }
};

}  // namespace

bool plan_reduce(ReducePlan* plan, const tpf_call& call, const Limits& limits, const tpf_card& card) {
  const Planner planner = {call, limits, card};
  const Fitted& fitted = fitted_to(card);
  *plan = {};
  if (planner.takes_all_rows()) {
    const RowsOfBlocks all = share_out(call.num_tokens, limits.max_ctas);
    plan->chunk_rows = all.rows;
    plan->num_chunks = 1;
    plan->cluster = all.rows <= 1 ? planner.cluster_of_row(all.blocks) : 1;
    plan->posted = call.source >= 0;
    if (planner.takes(plan, Body::kAllRows, 1, all.blocks)) return true;
  }
  if (planner.quantizes_all) return false;  // in one synchronisation, or by rs_rmsnorm_fp8 and a gather
  const RowsOfBlocks shared_out = share_out(planner.rows, limits.max_ctas);
  planner.begin(plan, 1, shared_out);
  if (plan->chunk_rows <= 1 && planner.has_one_row(planner.ranks_of_one_row())) {
    plan->cluster = planner.cluster_of_row(shared_out.blocks);
    // One way between cards, where an input read in place takes two; on a shared card of small pieces of a row.
    const bool posts = plan->cluster >= fitted.cluster_to_post || !shares_card(limits.max_ctas, card);
    plan->posted = posts && limits.world_size > 1 && planner.fits_inbox() && call.source >= 0;
    if (planner.takes(plan, Body::kOneRow, 1, shared_out.blocks)) return true;
  }
  if (planner.posts_few(shared_out.rows)) {
    plan->cluster = 1;
    plan->chunk_rows = shared_out.rows;
    plan->num_chunks = 1;
    plan->posted = call.source >= 0;
    if (planner.takes(plan, Body::kOneRow, 1, shared_out.blocks)) return true;
  }
  for (int cluster = 1; cluster <= kMaxCluster; cluster *= 2) {
    if (planner.takes_bulk(plan, cluster)) return true;
  }
  planner.begin(plan, 1, shared_out);
  const int most = most_vectors(planner.element_bytes);
  return (compiled_directly(4, planner.element_bytes, has_tma(card)) &&
          planner.takes(plan, Body::kDirect, 4, shared_out.blocks)) ||
         planner.takes(plan, Body::kDirect, most, shared_out.blocks);
}

}  // namespace tpf
