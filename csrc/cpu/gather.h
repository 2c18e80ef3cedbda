// The all-gather half that all_gather_rows, rs_rmsnorm_ag and the projections share.
#pragma once
#include <cstring>
#include <vector>

#include "round.h"

namespace tpf {

// output[num_tokens] <- every rank's rows, which begin at `offset` in its slot. `own` are this rank's rows; they may be
// in their place already.
inline void gather_rows(Round& round, char* output, const char* own, int64_t row_bytes, int64_t offset = 0) {
  for (int peer = 0; peer < round.world_size(); ++peer) {
    const Rows rows = round.rows(peer);
    const char* source = peer == round.rank() ? own : round.slot(peer) + offset;
    char* destination = output + rows.start * row_bytes;
    if (rows.count > 0 && source != destination) std::memcpy(destination, source, rows.count * row_bytes);
  }
}

// finish(token, row) for the rows of a latent of which each rank has multiplied its columns: they lie in its slot,
// [num_tokens, columns of the rank].
template <typename Finish>
void gather_columns(Round& round, const tpf_call& call, Finish&& finish) {
  const int64_t item = bytes_of(latent_dtype(call));
  std::vector<char> row(call.columns * item);
  for (int64_t token = 0; token < call.num_tokens; ++token) {
    for (int peer = 0; peer < round.world_size(); ++peer) {
      const Rows columns = latent_columns_of(call, peer, round.world_size());
      if (columns.count == 0) continue;
      std::memcpy(row.data() + columns.start * item, round.slot(peer) + token * columns.count * item,
                  columns.count * item);
    }
    finish(token, row.data());
  }
}

}  // namespace tpf
