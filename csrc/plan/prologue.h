// Which of its two ways mla_prologue goes: the same on all ranks, cards and backends.
#pragma once
#include <cstdint>

namespace tpf {

// Whether all ranks take all normed rows, and multiply them by a share of the weight each (rs_rmsnorm_ag,
// complete=True); else each multiplies its own rows by all of the weight (rs_rmsnorm).
//
// Gathered, rows of hidden_size columns travel: num_tokens of them. Else as many rows of the weight as it has columns
// are read by every rank. A byte from a peer takes as long as kLinkCost bytes of a rank's own memory: of both all but
// 1/W, so neither matters. Fitted to both ways of 2112 columns, 1 to 1024 tokens, in one run each: gathered took less
// time up to 128 tokens, and more from 192 on, on two H200; up to 128 and not 256 where four ranks share one; up to 128
// in fp8 and 256 in bf16 where eight do (docs/notes/prologue_ways.md). One rule serves bf16 and fp8.
inline bool gathers_normed_rows(int64_t num_tokens, int64_t columns, int world_size) {
  constexpr int64_t kLinkCost = 14;
  return world_size > 1 && num_tokens <= columns / kLinkCost;
}

}  // namespace tpf
