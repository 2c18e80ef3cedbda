// Which of its two ways mla_prologue goes: the same on all ranks, cards and backends.
#pragma once
#include <cstdint>

namespace tpf {

// Whether all ranks take all normed rows, and multiply them by a share of the weight each (rs_rmsnorm_ag,
// complete=True); else each multiplies its own rows by all of the weight (rs_rmsnorm). Counted for ranks with a card
// each (`python -m bench model`), not yet fitted.
//
// Gathered, rows of hidden_size columns travel: num_tokens of them. Else as many rows of the weight as it has columns
// are read by every rank. A byte from a peer takes as long as kLinkCost bytes of a rank's own memory: on an H200 4.8
// TB/s over 450 GB/s. All but 1/W of both, so neither matters. But rows that are gathered in a round of their own, as
// all but the fewest are of more than two ranks, cost a synchronisation more: about half of what reading a 16-bit
// weight costs, and all of what reading an fp8 one does. So with fp8 only those pay that all ranks add up in one round,
// whose bytes grow with W.
inline bool gathers_normed_rows(int64_t num_tokens, int64_t columns, int world_size, bool fp8) {
  constexpr int64_t kLinkCost = 10;
  if (world_size == 1) return false;
  if (fp8) return num_tokens * world_size <= columns / (2 * kLinkCost);
  return num_tokens <= columns / (world_size == 2 ? kLinkCost : 2 * kLinkCost);
}

}  // namespace tpf
