// rs_rmsnorm_kernel where a block has one row of each rank's share, or a cluster of blocks shares one; or where a block
// has a few, all of which are posted.
#pragma once
#include "../comm/inbox.cuh"
#include "rs_rmsnorm_poison.cuh"

namespace tpf {

// One thread's part: a vector of each row that goes and comes. What peers wait for is loaded before the epoch is
// known; what only this rank adds up is loaded while it waits for them. All rows fit an inbox or are one a block, so 32
// bits count all elements: what a warp spends on addresses is time. So is what it spends on ranks that there are not,
// or that there might not be: kRanks is the world size, or 0 where any is served.
template <typename T, int kRanks>
struct OneRow {
  // With what goes to the peers.
  __device__ OneRow(const RowView<T>& view, int row, int column) : column(column) {
    take_row(view, row);
    const T* from = static_cast<const T*>(view.args.input) + at(view, 0);
#pragma unroll
    for (int peer = 0; peer < kMostRanks<kRanks>; ++peer) {
      if (view.staged() && goes_to(view, peer)) vectors[peer] = load16(from);
      from += share(view, peer) * view.hidden;
    }
  }
  __device__ void take_row(const RowView<T>& view, int next) {
    row = next;
    owners = column >= view.hidden            ? 0
             : row < view.args.partition.per  ? world_size_of<kRanks>(view)
             : row == view.args.partition.per ? view.args.partition.rem
                                              : 0;
  }
  // The residual's vector may go to `place`, in shared memory.
  __device__ void load_own(const RowView<T>& view, uint4* place) {
    if (place != nullptr) copy16_async(place, residual_at(view), view.rank < owners && view.has_residual());
    if (view.rank >= owners) return;
    own = load16(static_cast<const T*>(view.args.input) + at(view, view.rank));
    if (view.has_residual() && place == nullptr) residual = load16(residual_at(view));
  }
  __device__ const T* residual_at(const RowView<T>& view) const {
    return static_cast<const T*>(view.args.residual) + row * view.hidden + column;
  }
  // Where this thread's vector of `owner`'s row is in an array of all tokens, in elements.
  __device__ int at(const RowView<T>& view, int owner) const {
    return (static_cast<int>(view.rows(owner).start) + row) * view.hidden + column;
  }
  __device__ static int share(const RowView<T>& view, int owner) { return static_cast<int>(view.rows(owner).count); }
  // Whether this thread has a vector of a row that `peer` owns, to send or, normalised, to gather.
  __device__ bool goes_to(const RowView<T>& view, int peer) const { return peer < owners && peer != view.rank; }
  // Whether this thread adds up a vector that `source` sends.
  __device__ bool comes_from(const RowView<T>& view, int source) const {
    return view.rank < owners && !view.complete && source < world_size_of<kRanks>(view) && source != view.rank;
  }
  // Where it posts that.
  __device__ char* posted(const RowView<T>& view, int peer, int source) const {
    return inbox_of(view.args.team, peer, view.epoch) + source * posted_bytes(view) +
           (row * view.hidden + column) * int{sizeof(T)};
  }
  // Where `owner` posts the same vector of its normalised row: behind what all sources post.
  __device__ char* gathered(const RowView<T>& view, int peer, int owner) const {
    return posted(view, peer, world_size_of<kRanks>(view) + owner);
  }
  // Of one source's rows.
  __device__ static int posted_bytes(const RowView<T>& view) { return share(view, 0) * view.hidden * int{sizeof(T)}; }

  // To all peers.
  __device__ void post(const RowView<T>& view) const {
#pragma unroll
    for (int peer = 0; peer < kMostRanks<kRanks>; ++peer) {
      if (goes_to(view, peer)) post16(posted(view, peer, view.rank), vectors[peer]);
    }
  }

  __device__ void begin_sum(const RowView<T>& view) {
#pragma unroll
    for (int source = 0; source < kMostRanks<kRanks>; ++source)
      vectors[source] = comes_from(view, source) ? uint4{} : own;
  }

  // Looks into the inbox until every source's vector has come; false, with the fault on record, where one does not.
  __device__ bool take_posted(const RowView<T>& view, const BlockRound& round) {
    return tpf::take_posted(
        vectors, view.args.team, view.args.call, round, [&] { return posted(view, view.rank, 0); },
        [&] { return posted_bytes(view); }, [&](int source) { return comes_from(view, source); },
        [](int source) { return source; });
  }

  // What was read is to be 0 again, in time for the round after the next.
  __device__ void clear_posted(const RowView<T>& view) const {
#pragma unroll
    for (int source = 0; source < kMostRanks<kRanks>; ++source) {
      if (comes_from(view, source)) store16(posted(view, view.rank, source), {});
    }
  }

  // To all peers: this thread's vector of the row that this rank has normalised.
  __device__ void post_normed(const RowView<T>& view, uint4 normed) const {
#pragma unroll
    for (int peer = 0; peer < kMostRanks<kRanks>; ++peer) {
      if (peer < world_size_of<kRanks>(view) && peer != view.rank) post16(gathered(view, peer, view.rank), normed);
    }
  }
  // The peers' vectors of theirs, out of the inbox and into the output.
  __device__ bool gather(const RowView<T>& view, const BlockRound& round) {
#pragma unroll
    for (int owner = 0; owner < kMostRanks<kRanks>; ++owner) vectors[owner] = {};
    const bool arrived = tpf::take_posted(
        vectors, view.args.team, view.args.call, round, [&] { return gathered(view, view.rank, 0); },
        [&] { return posted_bytes(view); }, [&](int owner) { return goes_to(view, owner); },
        [](int owner) { return owner; });
    if (!arrived) return false;
#pragma unroll
    for (int owner = 0; owner < kMostRanks<kRanks>; ++owner) {
      if (!goes_to(view, owner)) continue;
      store16(static_cast<T*>(view.args.output) + at(view, owner), vectors[owner]);
      store16(gathered(view, view.rank, owner), {});
    }
    return true;
  }

  // The sources' vectors, where their inputs are read in place.
  __device__ void load_in_place(const RowView<T>& view) {
    const int64_t bytes = at(view, view.rank) * int64_t{sizeof(T)};
#pragma unroll
    for (int source = 0; source < kMostRanks<kRanks>; ++source) {
      if (comes_from(view, source)) {
        vectors[source] = load16(input_of(view.args.symm, source) + bytes);
      }
    }
  }

  int row, column;
  int owners;  // ranks 0..owners-1 own a row of which this thread has a vector
  uint4 vectors[kMostRanks<kRanks>];
  uint4 own = {}, residual = {};
};

// A barrier of the block to which a thread comes when it has `value`, and not as soon as it has asked for what `value`
// is made of. Always true: no count exceeds the number of threads. It is compared all the same, so that the compiler
// keeps the count and with it the wait for `value`.
__device__ inline bool sync_having(float value) {
  return __syncthreads_count(value != value) <= static_cast<int>(blockDim.x);
}

template <typename T, Epilogue kEpilogue, int kRanks>
__device__ inline bool reduce_few_rows(const RowView<T>& view, const BlockRound& round, OneRow<T, kRanks>& one,
                                       const RowThreads& group) {
  constexpr bool kPosts = posts_normed_rows(kRanks), kSeveral = takes_several_rows(kRanks);
  if (!round.refused) {
    signal_unfenced_to_peers(view.args.team, round, 0, threadIdx.x);
    if (view.staged()) one.post(view);
#pragma unroll 1
    for (int row = one.row + view.row_blocks(); kSeveral && row < OneRow<T, kRanks>::share(view, 0);
         row += view.row_blocks()) {
      OneRow<T, kRanks>(view, row, one.column).post(view);
    }
  }
  // In shared memory is what there are not the registers to keep while peers are waited for.
  constexpr bool kNorms = kEpilogue != Epilogue::kSum, kGathers = kEpilogue == Epilogue::kGather;
  constexpr bool kLateWeight = kNorms && (kGathers || kSeveral);
  constexpr bool kLateResidual = kGathers && kMostRanks<kRanks> > 4;
  static_assert(!(kSeveral && kLateResidual), "the residual of a later row is not waited for");
  constexpr int kThreads = most_threads(Body::kOneRow, sizeof(T), true);
  __shared__ uint4 weights[kLateWeight ? kThreads : 1], residuals[kLateResidual ? kThreads : 1];
  uint4* const residual = kLateResidual ? residuals + threadIdx.x : nullptr;
  one.load_own(view, residual);
  RowWeight<T, 1> weight;
  if constexpr (kLateWeight) {
    weight.begin_init(view, group, weights + threadIdx.x);
    commit_copies();
  } else if constexpr (kNorms) {
    weight.init(view, group);
  }
  bool arrived = __syncthreads_and(!round.refused && wait_for_peers(view, round, 0, threadIdx.x));
  // Blocks b of all ranks are on their SMs. Once all blocks of this grid say so, the next kernel may take what is free
  // without being in anybody's way.
  pdl_trigger();
  // Of one row alone: more are posted.
  const bool closes = view.zero_copy && kEpilogue != Epilogue::kGather && !round.refused;
  if (closes && arrived && one.row >= view.own.count) {
    signal_unfenced_to_peers(view.args.team, round, kClosingStep, threadIdx.x);
  }
  // A block that saw a fault goes on: its cluster waits for it.
#pragma unroll 1
  for (int step = 0; one.row < one.share(view, view.rank); ++step) {
    one.begin_sum(view);
    if (view.zero_copy) one.load_in_place(view);
    if (view.staged() && arrived) arrived = one.take_posted(view, round);
    if (!arrived) one.vectors[0] = {~0u, ~0u, ~0u, ~0u};  // no mean for the blocks that share the row, either
    float sums[1][kLanes<T>];
    unpack(sums[0], one.vectors[0], T{});
#pragma unroll
    for (int source = 1; source < kMostRanks<kRanks>; ++source) {
      if (kRanks > 0 ? !view.complete : source < view.num_sources()) add_vector<T>(sums[0], one.vectors[source]);
    }
    if constexpr (kLateWeight) {
      wait_for_copies<0>();
      weight.end_init(view, weights + threadIdx.x);
    }
    if (view.has_residual()) add_vector<T>(sums[0], kLateResidual ? *residual : one.residual);
    if (closes && arrived) {
      // The peers have their inputs back while this row is still being finished.
      if (sync_having(sums[0][0])) signal_unfenced_to_peers(view.args.team, round, kClosingStep, threadIdx.x);
    }
    finish_row<T, 1, kEpilogue, false>(
        view, one.row, sums, weight, group, step, arrived,
        [&] {
          if (view.staged() && arrived) one.clear_posted(view);
        },
        [&](int64_t row, int column, uint4 normed) {
          if constexpr (kPosts) {
            one.post_normed(view, normed);
          } else {
            IntoSlot<T>{view}(row, column, normed);
          }
        });
    if constexpr (!kSeveral) break;
    one.take_row(view, one.row + view.row_blocks());
    one.load_own(view, residual);
  }
  if constexpr (kEpilogue == Epilogue::kGather && kPosts) {
    // A row that a peer has posted is one that it has read in place, so no closing step is needed.
#pragma unroll 1
    for (one.take_row(view, view.row_block()); one.row < one.share(view, 0) && arrived;) {
      arrived = one.gather(view, round);
      if constexpr (!kSeveral) break;
      one.take_row(view, one.row + view.row_blocks());
    }
  } else if constexpr (kEpilogue == Epilogue::kGather) {
    arrived = __syncthreads_and(arrived);
    const BlockRound next = {round.epoch + 1, round.fingerprint, round.call_number, false};
    if (arrived) {
      publish_to_peers(view.args.team, next, kGatherStep, threadIdx.x);
      arrived = wait_for_peers(view, next, kGatherStep, threadIdx.x);
    }
    __syncthreads();
    copy_vectors_of_peers([&](int peer) { return one.goes_to(view, peer); },
                          [&](int peer) { return static_cast<T*>(view.args.output) + one.at(view, peer); },
                          [&](int peer) { return view.gathered_row(peer, one.row) + one.column; });
  }
  if (closes && arrived) arrived = wait_for_readers(view, round, threadIdx.x);
  return arrived;
}

template <typename T, Epilogue kEpilogue, int kRanks>
__device__ inline void poison_few_rows(const RowView<T>& view, const OneRow<T, kRanks>&, int groups, int begin,
                                       int end) {
  poison_rows<T, kEpilogue>(view, view.row_block(), groups, begin, end);  // counted anew: registers are short
}

}  // namespace tpf
