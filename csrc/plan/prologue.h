// Which of its two ways mla_prologue goes: the same on all ranks, cards and backends.
#pragma once
#include <cstdint>

#include "fitted.h"

namespace tpf {

// Whether all ranks take all normed rows, and multiply them by a share of the weight each (rs_rmsnorm_ag,
// complete=True); else each multiplies its own rows by all of the weight (rs_rmsnorm).
//
// Gathered, rows of hidden_size columns travel: num_tokens of them. Else as many rows of the weight as it has columns
// are read by every rank. A byte from a peer takes as long as kLinkCost bytes of a rank's own memory: of both all but
// 1/W, so neither matters.
inline bool gathers_normed_rows(int64_t num_tokens, int64_t columns, int world_size) {
  return world_size > 1 && num_tokens <= columns / kLinkCost;
}

}  // namespace tpf
