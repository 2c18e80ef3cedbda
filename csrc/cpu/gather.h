// The all-gather half that all_gather_rows, rs_rmsnorm_ag and the projections share.
#pragma once
#include <cstring>

#include "round.h"

namespace tpf {

// output[num_tokens] <- every rank's rows, which begin at the head of its slot. `own` are this rank's rows; they may
// be in their place already.
inline void gather_rows(Round& round, char* output, const char* own, int64_t row_bytes) {
  for (int peer = 0; peer < round.world_size(); ++peer) {
    const Rows rows = round.rows(peer);
    const char* source = peer == round.rank() ? own : round.slot(peer);
    char* destination = output + rows.start * row_bytes;
    if (rows.count > 0 && source != destination) std::memcpy(destination, source, rows.count * row_bytes);
  }
}

}  // namespace tpf
