// rs_rmsnorm_kernel: one of its four bodies, and what is done after a fault.
#pragma once
#include <type_traits>

#include "rs_rmsnorm_all_rows.cuh"
#include "rs_rmsnorm_bulk.cuh"
#include "rs_rmsnorm_direct.cuh"
#include "rs_rmsnorm_one_row.cuh"
#include "rs_rmsnorm_poison.cuh"

namespace tpf {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasTma = false;
#else
constexpr bool kHasTma = true;
#endif

// kRanks: the world size, or 0 where any is served.
template <typename T, int kVecs, Epilogue kEpilogue, Body kBody, int kRanks>
__global__ void __launch_bounds__(most_threads(kBody, sizeof(T), kHasTma) + (kBody == Body::kBulk ? kHelperThreads : 0),
                                  1) rs_rmsnorm_kernel(const __grid_constant__ ReduceArgs args) {
  constexpr bool kGathers = kEpilogue == Epilogue::kGather;
  constexpr int kRounds = kGathers ? rounds_of_gather(kBody, kRanks) : 1;
  __shared__ WarpValues warp_values;
  if constexpr ((kBody == Body::kAllRows && !adds_up_all_rows(kCompiledFor)) ||
                (kBody == Body::kOneRow && !compiled_for_one_row(kRanks, sizeof(T), kGathers, kCompiledFor))) {
    return;  // never launched there
  } else if constexpr (kBody == Body::kOneRow || kBody == Body::kAllRows) {
    using Few = std::conditional_t<kBody == Body::kOneRow, OneRow<T, kRanks>, AllRows<T, kRanks>>;
    if (args.cluster > 1) {
      if (threadIdx.x == 0) warp_values.init(args.cluster * static_cast<int>(blockDim.x) / 32);
      cluster_arrive_relaxed();
    }
    pdl_wait();
    const RowView<T> early(args);
    const int cta = blockIdx.x & (args.cluster - 1), first = cta * blockDim.x;
    const RowThreads group = {static_cast<int>(blockDim.x), static_cast<int>(threadIdx.x), warp_values, first,
                              args.cluster};
    Few few(early, early.row_block(), group.vector(0) * kLanes<T>);
    const BlockRound round = begin_op(args.team, args.call, args.fingerprint, kRounds);
    if (args.cluster > 1) cluster_wait();
    const bool arrived = reduce_few_rows<T, kEpilogue>(RowView<T>(args, round.epoch), round, few, group);
    if (all_arrived<kEpilogue>(early, arrived)) return end_op(args.team);
    const int last = min(first + static_cast<int>(blockDim.x), early.hidden / kLanes<T>);
    poison_few_rows<T, kEpilogue>(RowView<T>(args), few, early.row_blocks(), first, last);
    end_faulted_op(args.team, args.call, round);
  } else if constexpr (kBody == Body::kDirect) {
    if constexpr (compiled_directly(kVecs, sizeof(T), kHasTma)) {
      const BlockRound round = begin_op(args.team, args.call, args.fingerprint, kRounds);
      const RowView<T> view(args, round.epoch);
      const bool arrived = !round.refused && reduce_directly<T, kVecs, kEpilogue>(view, round, warp_values);
      if (all_arrived<kEpilogue>(view, arrived)) return end_op(args.team);
      poison_rows<T, kEpilogue>(view);
      end_faulted_op(args.team, args.call, round);
    }
  } else {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    __shared__ BulkShared shared;
    static_assert(sizeof(shared) + sizeof(warp_values) <= kStaticSharedBytes);
    const RowPart part(args, kVecs * kVectorBytes, sizeof(T));
    if (threadIdx.x >= blockDim.x - 32) prefetch_rows(RowView<T>(args), part);
    if (threadIdx.x == 0) {
      shared.init(args.stages);
      if (args.cluster > 1) warp_values.init(args.cluster * kVecs * static_cast<int>(blockDim.x - kHelperThreads) / 32);
    }
    if (args.cluster > 1) cluster_arrive();
    const BlockRound round = begin_op(args.team, args.call, args.fingerprint, kRounds);
    if (args.cluster > 1) cluster_wait();
    const RowView<T> view(args, round.epoch);
    bool arrived = !shared.any_in_cluster(args.cluster, round.refused);
    if (arrived) arrived = reduce_in_bulk<T, kVecs, kEpilogue>(view, round, part, shared, warp_values);
    arrived = all_arrived<kEpilogue>(view, arrived);
    if (!shared.any_in_cluster(args.cluster, !arrived)) return end_op(args.team);
    poison_rows<T, kEpilogue>(view, claims_rows<kEpilogue>(view));
    end_faulted_op(args.team, args.call, round);
#endif
  }
}

}  // namespace tpf
