// rs_rmsnorm_kernel: one of its three bodies, and what is done after a fault.
#pragma once
#include "rs_rmsnorm_bulk.cuh"
#include "rs_rmsnorm_direct.cuh"
#include "rs_rmsnorm_one_row.cuh"

namespace tpf {

// The most threads of a body, helpers not counted: as many as leave each the registers that it needs.
template <typename T, Body kBody>
constexpr int kMaxThreads = kBody == Body::kBulk     ? kMaxAddingThreads
                            : kBody == Body::kDirect ? 256
                            : sizeof(T) == 2         ? 896
                                                     : 768;

template <typename T, int kVecs, Ending kEnding, Body kBody>
__global__ void __launch_bounds__(kMaxThreads<T, kBody> + (kBody == Body::kBulk ? kHelperThreads : 0), 1)
    rs_rmsnorm_kernel(const __grid_constant__ ReduceArgs args) {
  constexpr int kRounds = kEnding == Ending::kGather ? 2 : 1;
  __shared__ float partial[2 * kMaxPartials];
  if constexpr (kBody == Body::kOneRow) {
    wait_for_last_kernel();
    const View<T> early(args);
    const int part = blockIdx.x % args.parts, first = part * blockDim.x;
    const Group group = {static_cast<int>(blockDim.x), static_cast<int>(threadIdx.x), partial, first, args.parts};
    const OneRow<T> one(early, blockIdx.x / args.parts, group.vector(0) * kLanes<T>);
    const BlockRound round = begin_op(args.team, args.call, args.contract, kRounds);
    const bool arrived = reduce_one_row<T, kEnding>(View<T>(args, round.epoch), round, one, group);
    if (__syncthreads_and(arrived)) return;
    const int last = min(first + static_cast<int>(blockDim.x), early.hidden / kLanes<T>);
    const int64_t rows = kEnding == Ending::kGather ? args.call.num_tokens : early.own.count;
    for (int64_t row = one.row; row < rows; row += gridDim.x / args.parts) {
      poison_row<T, kEnding>(early, row, first, last);
    }
  } else {
    const BlockRound round = begin_op(args.team, args.call, args.contract, kRounds);
    const View<T> view(args, round.epoch);
    bool arrived = !round.refused;
    if (arrived) {
      if constexpr (kBody == Body::kDirect) {
        arrived = reduce_directly<T, kVecs, kEnding>(view, round, partial);
      } else {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        arrived = reduce_in_bulk<T, kVecs, kEnding>(view, round, partial);
#endif
      }
      arrived = __syncthreads_and(arrived);
      // The input is the caller's again when this kernel ends: all peers must have read it. In rs_rmsnorm_ag the
      // gathering says so already.
      if (arrived && view.zero_copy && kEnding != Ending::kGather) {
        publish_to_peers(view, round, kClosingStep, threadIdx.x);
        arrived = __syncthreads_and(wait_for_peers(view, round, kClosingStep, threadIdx.x));
      } else if (!arrived && kBody == Body::kBulk && claims_rows<kEnding>(view)) {
        poison_claimed_rows<T, kEnding>(view, round);
        return;
      }
    }
    if (!arrived) poison_rows<T, kEnding>(view);
  }
}

}  // namespace tpf
