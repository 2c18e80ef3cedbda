// What a plan depends on beside the call: the card, and what the workspace was made with.
#pragma once
#include <algorithm>

#include "../protocol.h"
#include "fitted.h"

namespace tpf {

constexpr int64_t kStaticSharedBytes = 2048;  // what the kernels declare besides their dynamic shared memory, at most
constexpr int kCopierStages = 4;              // buffers in shared memory that a BulkCopier copies through
constexpr int kVectorBytes = 16;              // what a thread loads and stores at once

// The same on all ranks.
struct Limits {
  int world_size;
  int max_ctas;                    // 1..TPF_MAX_CTAS
  int free_sms, free_cluster_sms;  // see tpf_team
  int64_t slot_bytes;
};

inline Limits limits_of(const tpf_team& team) {
  const int most = team.max_ctas > 0 ? std::min(team.max_ctas, TPF_MAX_CTAS) : TPF_MAX_CTAS;
  return {team.world_size, most, team.free_sms, team.free_cluster_sms, team.slot_bytes};
}

// What a card runs, of tpf_card's architectures. `built`: that of the card's own, if this build has code for it,
// else 80. `compiled`: what the code that the driver took was compiled from; PTX of a newer one than `built` may be.
constexpr int architecture_of(int built, int compiled) {
  const int taken = compiled >= 120 ? 120 : compiled >= 100 ? 100 : compiled >= 90 ? 90 : 80;
  return built > 80 ? built : taken;
}
static_assert(architecture_of(90, 90) == 90 && architecture_of(100, 103) == 100 && architecture_of(80, 86) == 80);
static_assert(architecture_of(80, 90) == 90);  // PTX of compute_90, on a card of which the build knows nothing

// Bulk copies by TMA, clusters of blocks, programmatic dependent launch.
inline bool has_tma(const tpf_card& card) { return card.architecture >= 90; }

inline const Fitted& fitted_to(const tpf_card& card) {
  return card.architecture >= 100 ? kFittedSm100 : card.architecture >= 90 ? kFittedSm90 : kFittedSm80;
}

// A rank with more blocks has a card to itself.
inline bool shares_card(int blocks, const tpf_card& card) { return blocks <= fitted_to(card).half_a_card; }

// GPCs of a card of that architecture, at most: a GB202 has 12.
constexpr int most_gpcs(int architecture) { return architecture >= 120 ? 12 : 8; }

// Whether a cluster of `size` blocks, one of a grid of `blocks`, finds room beside blocks that wait for it: it needs as
// many free SMs of one GPC. A pair finds them anywhere on the card.
inline bool cluster_fits(const Limits& limits, const tpf_card& card, int size, int blocks) {
  const int free_sms = size > 2 ? limits.free_cluster_sms : limits.free_sms;
  return size == 1 || limits.free_sms == 0 || free_sms - (blocks - size) > (size - 1) * most_gpcs(card.architecture);
}

constexpr int kUnclustered = 24;  // SMs of a card, more than are in no cluster of eight

struct RowsOfBlocks {
  int blocks;
  int rows;  // of one block, at most
};

// At most `max_ctas` blocks, with as few rows each as that allows; no more blocks than these rows need. The last one
// may have fewer rows.
inline RowsOfBlocks share_out(int64_t rows, int max_ctas) {
  const int64_t each = (rows + max_ctas - 1) / max_ctas;
  return {static_cast<int>(each > 0 ? (rows + each - 1) / each : 1), static_cast<int>(each)};
}

}  // namespace tpf
