// rs_rmsnorm_kernel without TMA: every thread copies and adds by itself.
#pragma once
#include "rs_rmsnorm.cuh"

namespace tpf {

template <typename T, int kVecs, Epilogue kEpilogue>
__device__ inline bool reduce_directly(const RowView<T>& view, const BlockRound& round, WarpValues& warp_values) {
  const ReduceArgs& args = view.args;
  const RowThreads group = {static_cast<int>(blockDim.x), static_cast<int>(threadIdx.x), warp_values};
  const auto column_of = [&](int v) { return group.vector(v) * kLanes<T>; };
  // For every peer that has row `row`: to(peer) <- from(peer).
  const auto copy_rows = [&](int64_t row, auto&& to, auto&& from) {
    const auto has = [&](int peer) { return is_peer(args.team, peer) && row < view.rows(peer).count; };
#pragma unroll 1
    for (int v = 0; v < kVecs; ++v) {
      const int column = column_of(v);
      if (column >= view.hidden) break;
      copy_vectors_of_peers(
          has, [&](int peer) { return to(peer) + column; }, [&](int peer) { return from(peer) + column; });
    }
  };
  const auto stage_chunk = [&](int chunk) {
#pragma unroll 1
    for (int step = chunk * args.chunk_rows; step < (chunk + 1) * args.chunk_rows; ++step) {
      const int64_t row = view.row_of(step);
      copy_rows(
          row, [&](int peer) { return view.staged_row(peer, view.rank, row); },
          [&](int peer) { return static_cast<const T*>(args.input) + (view.rows(peer).start + row) * view.hidden; });
    }
    __syncthreads();
    publish_to_peers(args.team, round, chunk, threadIdx.x);
  };

  bool arrived = true;
  if (view.staged()) {
    stage_chunk(0);
  } else {
    signal_unfenced_to_peers(args.team, round, 0, threadIdx.x);
  }
  RowWeight<T, kVecs> weight;
  if constexpr (kEpilogue != Epilogue::kSum) weight.init(view, group);
  const BlockRound next = {round.epoch + 1, round.fingerprint, round.call_number, false};
#pragma unroll 1
  for (int chunk = 0; chunk < args.num_chunks; ++chunk) {
    if (view.staged() && chunk + 1 < args.num_chunks) stage_chunk(chunk + 1);
    if (view.staged() || chunk == 0) {
      arrived = __syncthreads_and(arrived && wait_for_peers(view, round, chunk, threadIdx.x));
    }
#pragma unroll 1
    for (int step = chunk * args.chunk_rows; step < (chunk + 1) * args.chunk_rows; ++step) {
      const int64_t row = view.row_of(step);
      if (row >= view.own.count) break;
      float sums[kVecs][kLanes<T>];
#pragma unroll
      for (int v = 0; v < kVecs; ++v) {
        uint4 raw[TPF_MAX_RANKS + 1] = {};
        if (column_of(v) < view.hidden) {
#pragma unroll
          for (int source = 0; source < TPF_MAX_RANKS; ++source) {
            if (source < view.num_sources()) raw[source] = load16(view.source_row(source, row) + column_of(v));
          }
          if (view.has_residual()) {
            raw[TPF_MAX_RANKS] = load16(static_cast<const T*>(args.residual) + row * view.hidden + column_of(v));
          }
        }
        unpack(sums[v], raw[0], T{});
#pragma unroll
        for (int source = 1; source < TPF_MAX_RANKS; ++source) {
          if (source < view.num_sources()) add_vector<T>(sums[v], raw[source]);
        }
        if (view.has_residual()) add_vector<T>(sums[v], raw[TPF_MAX_RANKS]);
      }
      finish_row<T, kVecs, kEpilogue>(view, row, sums, weight, group, step, arrived);
    }
    if constexpr (kEpilogue == Epilogue::kGather) {
      __syncthreads();
      if (arrived) publish_to_peers(args.team, next, kGatherStep + chunk, threadIdx.x);
    }
  }
#pragma unroll 1
  for (int chunk = 0; kEpilogue == Epilogue::kGather && chunk < args.num_chunks; ++chunk) {
    arrived = __syncthreads_and(arrived && wait_for_peers(view, next, kGatherStep + chunk, threadIdx.x));
#pragma unroll 1
    for (int step = chunk * args.chunk_rows; step < (chunk + 1) * args.chunk_rows; ++step) {
      const int64_t row = view.row_of(step);
      copy_rows(
          row, [&](int peer) { return static_cast<T*>(args.output) + (view.rows(peer).start + row) * view.hidden; },
          [&](int peer) { return view.gathered_row(peer, row); });
    }
  }
  // The input is the caller's again when this kernel ends: all peers must have read it. In rs_rmsnorm_ag the gathering
  // says so already.
  if (view.zero_copy && kEpilogue != Epilogue::kGather && arrived) {
    __syncthreads();
    publish_to_peers(args.team, round, kClosingStep, threadIdx.x);
    arrived = __syncthreads_and(wait_for_readers(view, round, threadIdx.x));
  }
  return arrived;
}

}  // namespace tpf
