// rs_rmsnorm_kernel: one of its three bodies, and what is done after a fault.
#pragma once
#include "rs_rmsnorm_bulk.cuh"
#include "rs_rmsnorm_direct.cuh"
#include "rs_rmsnorm_one_row.cuh"

namespace tpf {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kIsSm90 = false;
#else
constexpr bool kIsSm90 = true;
#endif

template <typename T, int kVecs, Ending kEnding, Body kBody>
__global__ void __launch_bounds__(most_threads(kBody, sizeof(T), kIsSm90) + (kBody == Body::kBulk ? kHelperThreads : 0),
                                  1) rs_rmsnorm_kernel(const __grid_constant__ ReduceArgs args) {
  constexpr int kRounds = kEnding == Ending::kGather ? 2 : 1;
  __shared__ float partial[2 * kMaxPartials];
  if constexpr (kBody == Body::kOneRow) {
    __shared__ uint64_t heard;
    if (args.parts > 1) cluster_begin(&heard, args.parts * (blockDim.x / 32) * sizeof(float));
    wait_for_last_kernel();
    const View<T> early(args);
    const int part = blockIdx.x % args.parts, first = part * blockDim.x;
    const Group group = {
        static_cast<int>(blockDim.x), static_cast<int>(threadIdx.x), partial, first, args.parts, &heard};
    OneRow<T> one(early, blockIdx.x / args.parts, group.vector(0) * kLanes<T>);
    const BlockRound round = begin_op(args.team, args.call, args.contract, kRounds);
    if (args.parts > 1) cluster_begun();
    const bool arrived = reduce_one_row<T, kEnding>(View<T>(args, round.epoch), round, one, group);
    if (all_arrived<kEnding>(early, arrived)) return end_op(args.team);
    const int last = min(first + static_cast<int>(blockDim.x), early.hidden / kLanes<T>);
    poison_rows<T, kEnding>(early, one.row, gridDim.x / args.parts, first, last);
    end_faulted_op(args.team, args.call, round);
  } else if constexpr (kBody == Body::kDirect) {
    const BlockRound round = begin_op(args.team, args.call, args.contract, kRounds);
    const View<T> view(args, round.epoch);
    const bool arrived = !round.refused && reduce_directly<T, kVecs, kEnding>(view, round, partial);
    if (all_arrived<kEnding>(view, arrived)) return end_op(args.team);
    poison_rows<T, kEnding>(view);
    end_faulted_op(args.team, args.call, round);
  } else {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    __shared__ BulkShared shared;
    if (threadIdx.x >= blockDim.x - 32) prefetch_rows(View<T>(args));
    if (threadIdx.x == 0) shared.init(args.stages);
    const BlockRound round = begin_op(args.team, args.call, args.contract, kRounds);
    const View<T> view(args, round.epoch);
    const bool arrived = !round.refused && reduce_in_bulk<T, kVecs, kEnding>(view, round, shared, partial);
    if (all_arrived<kEnding>(view, arrived)) return end_op(args.team);
    poison_rows<T, kEnding>(view);
    end_faulted_op(args.team, args.call, round);
#endif
  }
}

}  // namespace tpf
