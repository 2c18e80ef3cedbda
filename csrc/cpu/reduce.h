// The reduce-scatter half that rs_rmsnorm, rs_rmsnorm_fp8, rs_rmsnorm_ag and reduce_scatter_rows share.
#pragma once
#include <cstring>

#include "round.h"
#include "rows.h"

namespace tpf {

template <typename T>
struct ReductionInputs {
  ReductionInputs(const void* input, const tpf_symm* symm, const void* residual, int hidden_size, uint32_t variant)
      : input(static_cast<const T*>(input)),
        symm(symm),
        residual((variant & TPF_RESIDUAL) != 0 ? static_cast<const T*>(residual) : nullptr),
        hidden_size(hidden_size),
        complete((variant & TPF_COMPLETE) != 0) {}

  const T* input;
  const tpf_symm* symm;  // null: staged
  const T* residual;     // this rank's rows, or null
  int hidden_size;
  bool complete;  // the input is reduced already: nothing travels, the ranks only meet
};

// Meets the peers, writes the rounded sum of each of this rank's rows to `sums`, and calls finish(row) after each,
// while the row is in the cache.
template <typename T, typename Finish>
tpf_status reduce_rows(Round& round, T* sums, const ReductionInputs<T>& in, Finish&& finish) {
  const int rank = round.rank(), world_size = round.world_size();
  const int64_t hidden = in.hidden_size;
  const Rows own = round.rows(rank);

  // 1. Stage the other ranks' rows. A slot holds row t at t * hidden, as the input does.
  const bool staged = in.symm == nullptr && !in.complete;
  for (int peer = 0; staged && peer < world_size; ++peer) {
    const Rows rows = round.rows(peer);
    if (peer == rank || rows.count == 0) continue;
    std::memcpy(round.slot(rank) + rows.start * hidden * sizeof(T), in.input + rows.start * hidden,
                rows.count * hidden * sizeof(T));
  }

  // 2. Meet.
  if (const tpf_status status = round.meet(0); status != TPF_OK) return status;

  // 3. Add up.
  const T* base[TPF_MAX_RANKS];
  int num_sources = 0;
  for (int peer = 0; peer < world_size; ++peer) {
    if (peer == rank) {
      base[num_sources++] = in.input;
    } else if (!in.complete) {
      base[num_sources++] = reinterpret_cast<const T*>(
          in.symm == nullptr ? round.slot(peer) : static_cast<const char*>(in.symm->base[peer]) + in.symm->offset);
    }
  }
  for (int64_t row = 0; row < own.count; ++row) {
    const T* sources[TPF_MAX_RANKS];
    for (int s = 0; s < num_sources; ++s) sources[s] = base[s] + (own.start + row) * hidden;
    sum_row(sums + row * hidden, sources, num_sources, in.residual == nullptr ? nullptr : in.residual + row * hidden,
            in.hidden_size);
    finish(row);
  }
  return TPF_OK;
}

}  // namespace tpf
