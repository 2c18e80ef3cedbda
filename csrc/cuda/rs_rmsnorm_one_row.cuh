// rs_rmsnorm_kernel where a block has one row, or a cluster of blocks shares one.
#pragma once
#include "rs_rmsnorm.cuh"

namespace tpf {

// Everything that does not hang on a peer is on its way before the epoch is known.
template <typename T>
struct OneRow {
  __device__ OneRow(const View<T>& view, int row, int column) : row(row), column(column), inside(column < view.hidden) {
    const T* input = static_cast<const T*>(view.args.input) + column;
#pragma unroll
    for (int peer = 0; peer < TPF_MAX_RANKS; ++peer) {
      if (view.staged() && goes_to(view, peer)) {
        outgoing[peer] = load16(input + (view.rows(peer).start + row) * view.hidden);
      }
    }
    if (row >= view.own.count || !inside) return;
    own = load16(input + (view.own.start + row) * view.hidden);
    if (view.has_residual()) {
      residual = load16(static_cast<const T*>(view.args.residual) + row * view.hidden + column);
    }
  }
  // Whether this thread has a vector of a row that `peer` owns.
  __device__ bool goes_to(const View<T>& view, int peer) const {
    return inside && peer < view.world_size && peer != view.rank && row < view.rows(peer).count;
  }

  const int row;
  const int column;
  const bool inside;
  uint4 outgoing[TPF_MAX_RANKS];
  uint4 own = {}, residual = {};
};

template <typename T, Ending kEnding>
__device__ inline bool reduce_one_row(const View<T>& view, const BlockRound& round, const OneRow<T>& one,
                                      const Group& group) {
#pragma unroll
  for (int peer = 0; peer < TPF_MAX_RANKS; ++peer) {
    if (!round.refused && view.staged() && one.goes_to(view, peer)) {
      store16(view.staged_row(peer, view.rank, one.row) + one.column, one.outgoing[peer]);
    }
  }
  __syncthreads();
  if (!round.refused) publish_to_peers(view, round, 0, threadIdx.x);
  RowWeight<T, 1> weight;
  if constexpr (kEnding != Ending::kSum) weight.init(view, group);
  bool arrived = __syncthreads_and(!round.refused && wait_for_peers(view, round, 0, threadIdx.x));
  // Blocks b of all ranks are on their SMs. Once all blocks of this grid say so, the next kernel may take what is free
  // without being in anybody's way.
  let_next_kernel_in();
  // A block that saw a fault goes on too: its cluster waits for it.
  const bool closes = view.zero_copy && kEnding != Ending::kGather && !round.refused;
  if (one.row < view.own.count) {
    uint4 raw[TPF_MAX_RANKS];
#pragma unroll
    for (int source = 0; source < TPF_MAX_RANKS; ++source) {
      const bool from_peer = source < view.num_sources() && source != view.rank && !view.complete && one.inside;
      raw[source] = from_peer ? load16(view.source_row(source, one.row) + one.column) : one.own;
    }
    if (!arrived) raw[0] = {~0u, ~0u, ~0u, ~0u};  // no mean for the blocks that share the row, either
    float sums[1][kLanes<T>];
    unpack(sums[0], raw[0], T{});
#pragma unroll
    for (int source = 1; source < TPF_MAX_RANKS; ++source) {
      if (source < view.num_sources()) add_vector<T>(sums[0], raw[source]);
    }
    if (view.has_residual()) add_vector<T>(sums[0], one.residual);
    if (closes) {
      // The peers have their inputs back while this row is still being finished.
      __syncthreads();
      publish_to_peers(view, round, kClosingStep, threadIdx.x);
    }
    finish_row<T, 1, kEnding>(view, one.row, sums, weight, group, 0, arrived);
  } else if (closes) {
    publish_to_peers(view, round, kClosingStep, threadIdx.x);
  }
  if constexpr (kEnding == Ending::kGather) {
    __syncthreads();
    const BlockRound next = {round.epoch + 1, round.contract, round.call_number, false};
    if (arrived) {
      publish_to_peers(view, next, kGatherStep, threadIdx.x);
      arrived = wait_for_peers(view, next, kGatherStep, threadIdx.x);
    }
    __syncthreads();
    // Four at a time: the registers of all are not there.
#pragma unroll 1
    for (int first = 0; first < TPF_MAX_RANKS; first += 4) {
      uint4 raw[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (one.goes_to(view, first + i)) raw[i] = load16(view.gathered_row(first + i, one.row) + one.column);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t row = view.rows(first + i).start + one.row;
        T* to = static_cast<T*>(view.args.output) + row * view.hidden + one.column;
        if (one.goes_to(view, first + i)) store16(to, raw[i]);
      }
    }
  }
  if (closes && arrived) arrived = wait_for_peers(view, round, kClosingStep, threadIdx.x);
  return arrived;
}

}  // namespace tpf
