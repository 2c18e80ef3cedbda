// How rs_rmsnorm, rs_rmsnorm_fp8, rs_rmsnorm_ag and reduce_scatter_rows are run: rs_rmsnorm_kernel's body and grid.
#pragma once
#include "card.h"

namespace tpf {

// At most one row a block, or a few that are posted; threads load and store 16 bytes at a time; TMA moves rows through
// shared memory; every rank adds up all rows, of rs_rmsnorm_ag and rs_rmsnorm_ag_fp8.
enum class Body { kOneRow, kDirect, kBulk, kAllRows };

constexpr int kMaxChunks = 7;           // of a block
constexpr int kHelperThreads = 64;      // kBulk: the staging and the fetching warp
constexpr int kMaxStages = 32;          // kBulk: row buffers of the ring
constexpr int kMaxAddingThreads = 448;  // kBulk: with the helpers 16 warps, 128 registers each
constexpr int kMaxCluster = 8;          // blocks that share a row; the largest portable cluster

// The most threads of a body, helpers not counted: as many as leave each the registers that it needs.
TPF_HD constexpr int most_threads(Body body, int element_bytes, bool has_tma) {
  if (body == Body::kBulk) return kMaxAddingThreads;
  if (body == Body::kDirect) return 256;
  return !has_tma ? 640 : element_bytes == 2 ? 896 : 768;
}

// Vectors of a row that a thread of kDirect holds at most: enough for the widest row.
TPF_HD constexpr int most_vectors(int element_bytes) { return element_bytes == 4 ? 16 : 8; }

// Which forms of kDirect are compiled for a card: where TMA moves rows, it is left with the widest ones.
TPF_HD constexpr bool compiled_directly(int vectors, int element_bytes, bool has_tma) {
  return !has_tma || vectors == most_vectors(element_bytes);
}

// Whether kAllRows is compiled for a card: on newer ones its threads want more registers than there are.
TPF_HD constexpr bool adds_up_all_rows(int architecture) { return architecture < 100; }

// kOneRow and kAllRows of 16 bits are compiled for 2, for 4 and for 8 ranks, besides for any number: of a call of few
// tokens a large part is the time that its warps need for their instructions, and many of these are there for each
// rank.
TPF_HD constexpr bool compiled_for_ranks(int element_bytes) { return element_bytes == 2; }

// Whether kOneRow is compiled for so many ranks, 0 being any number, on a card: on the newest ones some forms want more
// registers than there are.
TPF_HD constexpr bool compiled_for_one_row(int ranks, int element_bytes, bool gathers, int architecture) {
  if (ranks != 0 && ranks != 2 && ranks != 4 && ranks != 8) return false;
  if (ranks != 0 && !compiled_for_ranks(element_bytes)) return false;
  return architecture < 120 || element_bytes == 4 || !gathers || ranks == 2 || ranks == 4;
}

// How kOneRow of rs_rmsnorm_ag gathers normalised rows: where it is compiled for a number of ranks by posting them,
// else by fetching what the peers publish in their slots.
TPF_HD constexpr bool posts_normed_rows(int ranks) { return ranks > 0; }

// Rounds of rs_rmsnorm_ag: two, where owners publish their normalised rows. All ranks have to take as many.
TPF_HD constexpr int rounds_of_gather(Body body, int ranks) {
  return body == Body::kAllRows || (body == Body::kOneRow && posts_normed_rows(ranks)) ? 1 : 2;
}

// Whether a block of kOneRow may have several rows, all of which are posted. Of more ranks so many hardly fit an inbox.
TPF_HD constexpr bool takes_several_rows(int ranks) { return ranks == 2 || ranks == 4; }

struct ReducePlan {
  Body body;
  int vectors;  // of a row, that a thread holds
  int blocks, threads;
  int64_t shared_bytes;
  int cluster;  // blocks that share a row
  int ranks;    // kOneRow, kAllRows: that the kernel is compiled for; 0: any number
  int chunk_rows, num_chunks;
  int stages;   // kBulk: row buffers of the ring
  bool posted;  // staged, although the input could be read in place
};

// False where no body serves.
bool plan_reduce(ReducePlan* plan, const tpf_call& call, const Limits& limits, const tpf_card& card);

}  // namespace tpf
