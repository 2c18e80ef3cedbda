// Litmus tests of what does not wait for a signal alone: posted rows, counted tiles, fault records.
#pragma once
#include "litmus.cuh"

namespace tpf {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Two ranks post rows into each other's inboxes in turn. In the product a kernel ends before its inbox is written
// again; here its reader publishes that it has read and cleared it.
__device__ inline bool post_rows(const Setup& setup, uint32_t& wrong) {
  const int rank = blockIdx.y;
  const ReduceArgs& args = setup.ranks[rank];
  OneRow<float, 0> one(RowView<float>(args), blockIdx.x, threadIdx.x * kLanes<float>);
  for (uint32_t epoch = 1; epoch <= kRounds; ++epoch) {
    const BlockRound round = round_of(setup, epoch);
    const RowView<float> view(args, epoch);
    const uint4 expected = value(epoch, threadIdx.x);
    if ((epoch & 1) == rank) {
#pragma unroll
      for (uint4& vector : one.vectors) vector = expected;
      one.post(view);
      if (!wait_for_rows(setup, rank, round, 0)) return false;
      continue;
    }
    one.begin_sum(view);
    if (!__syncthreads_and(one.take_posted(view, round))) return false;
#pragma unroll
    for (int source = 0; source < kMostRanks<0>; ++source) {
      if (one.comes_from(view, source)) wrong += differ(one.vectors[source], expected);
    }
    one.clear_posted(view);
    publish_rows(setup, rank, round, 0);
  }
  return true;
}

struct OneRowTiles {
  static constexpr int kRows = 1;
};

// A block of rank 0 writes a tile, another one norms half of it in place, and whoever counts last publishes it. Rank 1
// is the third row of the grid.
__device__ inline bool finish_tiles(const Setup& setup, uint32_t& wrong) {
  constexpr int kHalf = kVectors / 2;
  const ProjectionArgs& args = setup.projection;
  for (uint32_t epoch = 1; epoch <= kRounds; ++epoch) {
    const BlockRound round = round_of(setup, epoch);
    char* const rows = rows_of(args.team, 0, epoch);
    const auto at = [&](int v) { return rows + in_global(v) * 16; };
    const auto written = [&](int v) { return value(epoch, first_vector() + in_global(v)); };
    const auto normed = [&](int v) { return value(~epoch, first_vector() + in_global(v)); };
    if (blockIdx.y == 2) {
      read_stale(rows, kVectors, wrong);
      if (!wait_for_rows(setup, 1, round, 0)) return false;
      for (int v = kVectors - 1; v >= 0; --v) {
        wrong += differ(load16_cached(at(v)), v < kHalf ? normed(v) : written(v));
      }
      publish_rows(setup, 1, round, 1);
      continue;
    }
    if (blockIdx.y == 0) {
#pragma unroll
      for (int v = kVectors - 1; v >= 0; --v) store16(at(v), written(v));
    } else {
      read_stale(rows, kHalf, wrong);
      const auto all_tiles = [&] { return has_come_to(count_of(args, blockIdx.x), args.column_tiles); };
      if (!__syncthreads_and(threadIdx.x >= 32 || wait_until(0xffffffffu, all_tiles))) return false;
      for (int v = 0; v < kHalf; ++v) wrong += differ(load16_cached(at(v)), written(v));
      for (int v = 0; v < kHalf; ++v) store16(at(v), normed(v));
    }
    __syncthreads();
    if (threadIdx.x < 32) count<OneRowTiles, true>(args, round, blockIdx.x, 1);
    if (!wait_for_rows(setup, 0, round, 1)) return false;
  }
  return true;
}

// Rank 0 reports faults. When rank 1 sees a record's status, or `faulted`, the record is whole.
__device__ inline bool report_faults(const Setup& setup, uint32_t& wrong) {
  if (blockIdx.x > 0 || threadIdx.x > 0) return true;  // a rank has one record
  const tpf_team& team = setup.ranks[blockIdx.y].team;
  Control* const reporter = control(team.region[0]);
  uint64_t* const heard = signal(team.region[0], 0, 0, 1);
  const auto is_set = [](auto& word) {
    return shared_ref<std::remove_reference_t<decltype(word)>>(word).load(order::memory_order_acquire) != 0;
  };
  for (uint32_t epoch = 1; epoch <= kRounds; ++epoch) {
    if (blockIdx.y == 0) {
      tpf_call call = setup.ranks[0].call;
      call.num_tokens = call.source = epoch;
      // A rank that is closed tells its peers nothing, and here they need not be told.
      report(team, call, round_of(setup, epoch), TPF_CLOSED, 1, 0, signal_word(epoch, 0), epoch);
      if (!wait_until(1, [&] { return reached(epoch_of(observe(heard)), epoch); })) return false;
      continue;
    }
    tpf_fault* const record = epoch % 3 == 0 ? team.mailbox : &reporter->fault;
    const auto has_come = [&] { return epoch % 3 == 1 ? is_set(reporter->faulted) : is_set(record->status); };
    if (!wait_until(1, has_come)) return false;
    wrong += record->rank != 0 || record->peer != 1 || record->epoch != epoch || record->seen_epoch != epoch ||
             record->call_number != epoch || record->waited_ns != epoch || record->expected.num_tokens != epoch ||
             record->expected.source != epoch;
    if (!wait_until(1, [&] { return is_set(reporter->faulted); })) return false;
    reporter->faulted = reporter->claimed = 0;
    reporter->fault.status = team.mailbox->status = TPF_OK;
    publish(heard, epoch, 0);
  }
  return true;
}

#endif

}  // namespace tpf
