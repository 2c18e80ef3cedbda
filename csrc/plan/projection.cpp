#include "projection.h"

#include <limits>

namespace tpf {
namespace {

constexpr int kMostQColumns = kQVectors * 32 * 8, kMostKvColumns = kKvVectors * 32 * 8;  // a lane has 8 of a vector

int tiles_of(int64_t size, int tile) { return static_cast<int>((size + tile - 1) / tile); }

// What a plan needs of a kind of tiles.
struct TileNumbers {
  TileKind kind;
  int rows, columns, stage_bytes, products;
  int shared_bytes, normed_shared_bytes, normed_buffer_bytes;
};

template <int kElementBytes, TileKind kKind>
constexpr TileNumbers numbers_of() {
  using Shape = TileShapeOf<kElementBytes, kKind>;
  using Normed = SharedBytes<Shape, true>;
  return {kKind,
          Shape::kRows,
          Shape::kColumns,
          Shape::kStageBytes,
          first_product(Shape::kAccumulators) < Shape::kAccumulators ? 2 : 1,
          SharedBytes<Shape, false>::kAll,
          Normed::kAll,
          Normed::buffer_bytes(Normed::kBuffers)};
}

struct Planner {
  const tpf_call& call;
  const Limits& limits;
  const tpf_card& card;
  const Fitted& fitted = fitted_to(card);
  const int64_t rows = partition_of(call.num_tokens, limits.world_size).largest();
  const bool scaled = call.dtype == TPF_E4M3, norm = is_normed(call);

  int row_blocks(const TileNumbers& tile) const { return std::max(1, tiles_of(rows, tile.rows)); }

  // Rows that are normed are copied whole.
  bool serves(const TileNumbers& tile) const {
    return row_blocks(tile) <= TPF_MAX_ROW_BLOCKS && !(norm && int64_t{call.columns} * 2 > tile.normed_buffer_bytes);
  }

  // About the time of a call, in cycles. A block reads its operands at so many bytes a cycle and multiplies meanwhile;
  // of fp8 it waits for each product. Ranks that share a card read a weight each, so fewer bytes a cycle, and what they
  // copy goes the same way: the two add up. Where a rank has a card to itself, the rows that are complete before the
  // last wave are copied meanwhile, which fp8 products are not long enough to hide all of, and the others after it; or,
  // where copying takes longest, all of them after the first ones are complete.
  int64_t cost_of(const TileNumbers& tile, int k_blocks, int blocks) const {
    if (!serves(tile)) return std::numeric_limits<int64_t>::max();
    const int64_t row_blocks = this->row_blocks(tile);
    const int64_t column_tiles = tiles_of(call.columns, tile.columns), group = kGrouped * column_tiles;
    const int64_t waves = tiles_of(row_blocks * column_tiles, blocks);
    const int product = tile.rows * tile.columns / fitted.products_a_cycle;
    const int waits = scaled ? fitted.fp8_wait * tile.products : 0;
    const bool shared = shares_card(blocks, card);
    const int bytes_a_cycle = scaled   ? fitted.fp8_operands
                              : shared ? fitted.shared_card_operands
                                       : fitted.own_card_operands;
    const int64_t wave = k_blocks * int64_t{std::max(product + waits, tile.stage_bytes / bytes_a_cycle)};
    if (limits.world_size == 1) return waves * wave;
    const int64_t bytes = call.num_tokens * call.columns * 2;  // 16-bit rows
    const int64_t copying = bytes / std::min(fitted.block_copies * blocks, fitted.card_copies);
    if (shared) return waves * wave + copying;
    const int64_t first = tiles_of(std::min<int64_t>(row_blocks, kGrouped) * column_tiles, blocks);
    const int64_t late = row_blocks - (waves - 1) * blocks / group * kGrouped;
    const int64_t seen = 100 * late + (scaled ? fitted.fp8_copies_seen : 0) * (row_blocks - late);  // percent
    return std::max(waves * wave + copying * seen / (100 * row_blocks), first * wave + copying);
  }

  // By the shape and the grid alone, so that all ranks take the same. Of 256 x 144 beside peers cost_of promises too
  // much: up to 1.1 of the others' time (docs/notes/tiles_own_card.md).
  template <int kElementBytes, TileKind... kKinds>
  TileNumbers cheapest(TileKinds<kKinds...>, int k_blocks, int blocks) const {
    static constexpr TileNumbers kTiles[] = {numbers_of<kElementBytes, kKinds>()...};
    const TileNumbers* found = nullptr;
    int64_t least = 0;
    for (const TileNumbers& tile : kTiles) {
      if (tile.kind == TileKind::kLargeNarrow && limits.world_size > 1) continue;
      const int64_t cost = cost_of(tile, k_blocks, blocks);
      if (found == nullptr || cost < least) found = &tile, least = cost;
    }
    return *found;
  }
};

}  // namespace

ProjectionPlan plan_projection(const tpf_call& call, bool aligned, const Limits& limits, const tpf_card& card) {
  const Planner planner = {call, limits, card};
  const int64_t row_bytes = call.hidden_size * bytes_of(static_cast<tpf_dtype>(call.dtype));
  const uint32_t rest = call.columns - call.q_columns - call.kv_columns;
  ProjectionPlan plan = {};
  if (call.columns == 0 || (call.variant & TPF_COMPLETE) != 0 || !card.has_wgmma || !aligned || call.dtype == TPF_F32 ||
      row_bytes % 16 != 0 || call.columns % 8 != 0 || call.q_columns % 8 != 0 || call.kv_columns % 8 != 0 ||
      rest % 8 != 0 || call.q_columns > kMostQColumns || call.kv_columns > kMostKvColumns) {
    return plan;
  }
  // As many blocks as there may be, even where they have no tile: they copy. All must be on the card at once, since
  // each waits for what the others multiply.
  plan.blocks = std::min(limits.max_ctas, card.sm_count);
  if (plan.blocks > 16) plan.blocks -= plan.blocks % 2;  // so many are better off in pairs
  // Of fp8 the product would be Triton's, with which this one has not been compared.
  plan.few_rows = limits.world_size > 1 && !planner.scaled && !shares_card(plan.blocks, card) &&
                  planner.rows <= fitted_to(card).few_rows;
  if (plan.few_rows) return plan;
  plan.k_blocks = static_cast<int>((row_bytes + kSwizzleBytes - 1) / kSwizzleBytes);
  const TileNumbers tile = planner.scaled ? planner.cheapest<1>(TilesOfFp8{}, plan.k_blocks, plan.blocks)
                                          : planner.cheapest<2>(TilesOf16Bits{}, plan.k_blocks, plan.blocks);
  plan.fused = planner.serves(tile);
  plan.tile = tile.kind;
  plan.tile_rows = tile.rows;
  plan.tile_columns = tile.columns;
  plan.row_blocks = planner.row_blocks(tile);
  plan.column_tiles = tiles_of(call.columns, tile.columns);
  plan.shared_bytes = planner.norm ? tile.normed_shared_bytes : tile.shared_bytes;
  // Where ranks share a card, a rank's blocks would lie among the others'. In pairs, neighbouring SMs ask for the same
  // weights, and a call takes less time. A grid that has the card to itself gained nothing.
  const bool pairs = plan.blocks % 2 == 0 && plan.blocks <= card.sm_count / 2;
  plan.cluster = pairs && cluster_fits(limits, card, 2, plan.blocks) ? 2 : 1;
  return plan;
}

}  // namespace tpf
