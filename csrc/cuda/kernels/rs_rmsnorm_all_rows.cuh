// rs_rmsnorm_kernel where every rank adds up all rows: rs_rmsnorm_ag of few tokens, in one synchronisation instead of
// two; and rs_rmsnorm_ag_fp8 of as few, whose rows every rank quantises, too.
//
// A rank posts its rows of the input, and the rows of the residual that it owns, into all peers' inboxes. There the
// residual's rows come first, then those of rank 0, of rank 1, ... All ranks add up the same values in the same order,
// so they come to the same bits, which are those of the other bodies.
#pragma once
#include "../comm/inbox.cuh"
#include "rs_rmsnorm_poison.cuh"

namespace tpf {

// One thread's vector of one row of all. What this rank has of it is loaded when this is made. kRanks: as OneRow's.
template <typename T, int kRanks>
struct AllRows {
  __device__ AllRows(const RowView<T>& view, int row, int column)
      : row(row),
        column(column),
        inside(row < static_cast<int>(view.args.call.num_tokens) && column < view.hidden),
        owned(static_cast<uint32_t>(row - static_cast<int>(view.own.start)) < static_cast<uint32_t>(view.own.count)) {
    if (!inside) return;
    own = load16(static_cast<const T*>(view.args.input) + row * view.hidden + column);
    if (owned && view.has_residual()) {
      const int own_row = row - static_cast<int>(view.own.start);
      residual = load16(static_cast<const T*>(view.args.residual) + own_row * view.hidden + column);
    }
  }

  // Of one rank's rows, in an inbox.
  __device__ static int posted_bytes(const RowView<T>& view) {
    return static_cast<int>(view.args.call.num_tokens) * view.hidden * int{sizeof(T)};
  }
  // This vector of the residual; of source s it lies posted_bytes * (s + 1) behind.
  __device__ char* posted(const RowView<T>& view, int rank) const {
    return inbox_of(view.args.team, rank, view.epoch) + (row * view.hidden + column) * int{sizeof(T)};
  }
  // Whether vector `i` of `vectors` comes from a peer.
  __device__ bool comes(const RowView<T>& view, int i) const {
    if (i == 0) return inside && view.has_residual() && !owned;
    return inside && i <= world_size_of<kRanks>(view) && i - 1 != view.rank;
  }
  __device__ static int owner_of(const RowView<T>& view, int row) {
    int rank = 0;
    while (row >= view.rows(rank).start + view.rows(rank).count) ++rank;
    return rank;
  }

  __device__ void post(const RowView<T>& view) const {
    if (!inside) return;
    const bool posts_residual = owned && view.has_residual();
    const int offset = (view.rank + 1) * posted_bytes(view);
#pragma unroll
    for (int peer = 0; peer < kMostRanks<kRanks>; ++peer) {
      if (peer >= world_size_of<kRanks>(view) || peer == view.rank) continue;
      char* const to = posted(view, peer);
      post16(to + offset, own);
      if (posts_residual) post16(to, residual);
    }
  }

  __device__ void begin_sum(const RowView<T>& view) {
#pragma unroll
    for (int i = 0; i <= kMostRanks<kRanks>; ++i) vectors[i] = comes(view, i) ? uint4{} : i == 0 ? residual : own;
  }

  __device__ bool take_posted(const RowView<T>& view, const BlockRound& round) {
    return tpf::take_posted(
        vectors, view.args.team, view.args.call, round, [&] { return posted(view, view.rank); },
        [&] { return posted_bytes(view); }, [&](int i) { return comes(view, i); },
        [&](int i) { return i == 0 ? owner_of(view, row) : i - 1; });
  }

  // As OneRow's.
  __device__ void clear_posted(const RowView<T>& view) const {
    char* const first = posted(view, view.rank);
#pragma unroll
    for (int i = 0; i <= kMostRanks<kRanks>; ++i) {
      if (comes(view, i)) store16(first + i * posted_bytes(view), {});
    }
  }

  int row, column;
  bool inside, owned;
  uint4 own = {}, residual = {};
  uint4 vectors[1 + kMostRanks<kRanks>];  // the residual's, then the sources'
};

// Rows b, b + groups, ... of all; `first` is of the first one.
template <typename T, Epilogue kEpilogue, int kRanks>
__device__ inline bool reduce_few_rows(const RowView<T>& view, const BlockRound& round, AllRows<T, kRanks>& first,
                                       const RowThreads& group) {
  const int num_tokens = static_cast<int>(view.args.call.num_tokens);
  const int groups = view.row_blocks();
  if (!round.refused) {
    signal_unfenced_to_peers(view.args.team, round, 0, threadIdx.x);
    first.post(view);
#pragma unroll 1
    for (int row = first.row + groups; row < num_tokens; row += groups)
      AllRows<T, kRanks>(view, row, first.column).post(view);
  }
  RowWeight<T, 1> weight;
  __shared__ uint4 late[most_threads(Body::kAllRows, sizeof(T), true)];
  weight.begin_init(view, group, late + threadIdx.x);
  commit_copies();
  bool arrived = __syncthreads_and(!round.refused && wait_for_peers(view, round, 0, threadIdx.x));
  pdl_trigger();  // as in OneRow's
  AllRows<T, kRanks> one = first;
#pragma unroll 1
  for (int step = 0; one.row < num_tokens; ++step) {
    one.begin_sum(view);
    // A block that saw a fault goes on: its other threads and its cluster wait for it.
    if (arrived) arrived = one.take_posted(view, round);
    if (!arrived) one.vectors[1] = {~0u, ~0u, ~0u, ~0u};
    float sums[1][kLanes<T>];
    unpack(sums[0], one.vectors[1], T{});
#pragma unroll
    for (int source = 1; source < kMostRanks<kRanks>; ++source) {
      if (source < world_size_of<kRanks>(view)) add_vector<T>(sums[0], one.vectors[1 + source]);
    }
    if (view.has_residual()) add_vector<T>(sums[0], one.vectors[0]);
    wait_for_copies<0>();
    weight.end_init(view, late + threadIdx.x);
    finish_row<T, 1, kEpilogue, true>(
        view, one.row, sums, weight, group, step, arrived,
        [&] {
          if (arrived) one.clear_posted(view);
        },
        Nothing{});
    one = AllRows<T, kRanks>(view, one.row + groups, one.column);
  }
  return arrived;
}

// As poison_rows of the other bodies, of the rows that a block has here: counted anew, since registers are short.
template <typename T, Epilogue kEpilogue, int kRanks>
__device__ inline void poison_few_rows(const RowView<T>& view, const AllRows<T, kRanks>&, int groups, int begin,
                                       int end) {
  __syncthreads();
#pragma unroll 1
  for (int row = view.row_block(); row < view.args.call.num_tokens; row += groups) {
    const int owner = AllRows<T, kRanks>::owner_of(view, row);
    poison_row<T, kEpilogue, true>(view, owner, row - view.rows(owner).start, begin, end, threadIdx.x, blockDim.x);
  }
}

}  // namespace tpf
