// rs_rmsnorm_kernel by TMA: it moves the rows, and threads add them up in shared memory.
#pragma once
#include "rs_rmsnorm_poison.cuh"

namespace tpf {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// The bytes of every row that this block works on: all, or a part, where a cluster shares it.
struct RowPart {
  // A thread holds `thread_bytes` of it.
  __device__ RowPart(const ReduceArgs& args, int thread_bytes, int element_bytes) {
    const uint32_t row = args.call.hidden_size * element_bytes;
    stride = min((blockDim.x - kHelperThreads) * thread_bytes, row);
    first = (blockIdx.x & (args.cluster - 1)) * stride;
    bytes = min(stride, row - first);
  }
  template <typename T>
  __device__ T* of(T* row) const {
    return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(row) + first);
  }

  uint32_t first, bytes;
  uint32_t stride;  // of the row buffers: the largest part
};

struct BulkShared {
  alignas(8) uint64_t full[kMaxStages];
  alignas(8) uint64_t empty[kMaxStages];
  alignas(8) uint64_t copied[kCopierStages];
  int64_t row[kMaxStages];   // the row that begins in this buffer; -1 after the last
  bool gave_up[kMaxStages];  // when this was a peer's row, or the end: what did not arrive is not passed on
  uint32_t faulted;          // in any block of the cluster

  // By one thread; a barrier of the block follows.
  __device__ void init(int stages) {
    faulted = 0;
#pragma unroll  // at constant places
    for (int stage = 0; stage < kMaxStages; ++stage) {
      if (stage == stages) break;
      barrier_init(&full[stage], 1);
      barrier_init(&empty[stage], blockDim.x - kHelperThreads);
    }
    for (int stage = 0; stage < kCopierStages; ++stage) barrier_init(&copied[stage], 1);
    fence_async_shared();
  }

  // By all threads of all blocks of a cluster, which have begun: whether `fault`, the same in all threads of a block,
  // is true in any of them, or was. No block then waits for a part of a row that is not added up, and all poison
  // theirs.
  __device__ bool any_in_cluster(int cluster, bool fault) {
    if (cluster == 1) return fault;
    if (const int cta = threadIdx.x; fault && cta < cluster) cluster_store(&faulted, cta, 1);
    cluster_arrive();
    cluster_wait();
    return __syncthreads_or(faulted != 0);
  }
};

// While the ranks still look for each other, a rank's input comes to its L2 cache, as far as it is fetched first: a row
// for every block of every rank.
template <typename T>
__device__ inline void prefetch_rows(const RowView<T>& view, const RowPart& part) {
  if (!view.zero_copy || view.complete) return;
  for (int peer = 0; peer < view.world_size; ++peer) {
    const Rows rows = view.rows(peer);
    if (view.row_block() >= rows.count || !elect()) continue;
    const T* const row = static_cast<const T*>(view.args.input) + (rows.start + view.row_block()) * view.hidden;
    bulk_prefetch(part.of(row), part.bytes);
  }
}

// The staging warp: stages this rank's rows for the peers, chunk by chunk; in rs_rmsnorm_ag it then copies theirs.
template <typename T, Epilogue kEpilogue>
__device__ inline bool move_rows(const RowView<T>& view, const BlockRound& round, const RowPart& part,
                                 BulkShared& shared, char* buffers) {
  const ReduceArgs& args = view.args;
  const int lane = threadIdx.x % 32;
  BulkCopier copier(buffers, shared.copied, part.stride);
  const auto copy = [&](T* to, const T* from, uint64_t policy) {
    copier.copy(reinterpret_cast<char*>(part.of(to)), reinterpret_cast<const char*>(part.of(from)), part.bytes, policy);
  };
  bool arrived = true;
  // copy_row(peer, row, rows of the peer) for all peers' rows of a chunk
  const auto for_chunk = [&](int chunk, auto&& copy_row) {
    for (int step = chunk * args.chunk_rows; step < (chunk + 1) * args.chunk_rows; ++step) {
      const int64_t row = view.row_of(step);
      if (row >= args.partition.largest()) break;
      for_peers(args.team, [&](int peer) {
        const Rows rows = view.rows(peer);
        if (row < rows.count) copy_row(peer, row, rows);
      });
    }
  };
  if (!view.staged()) signal_unfenced_to_peers(args.team, round, 0, lane);
  for (int chunk = 0; view.staged() && chunk < args.num_chunks; ++chunk) {
    for_chunk(chunk, [&](int peer, int64_t row, Rows rows) {
      copy(view.staged_row(peer, view.rank, row), static_cast<const T*>(args.input) + (rows.start + row) * view.hidden,
           normal_policy());
    });
    copier.flush();
    fence_async_global();
    __syncwarp();
    publish_to_peers(args.team, round, chunk, lane);
  }
  if constexpr (kEpilogue == Epilogue::kGather) {
    const BlockRound next = {round.epoch + 1, round.fingerprint, round.call_number, false};
    for (int chunk = 0; chunk < args.num_chunks; ++chunk) {
      // A peer that still waits for another rank's part of these rows has not published them: a fault names that rank.
      arrived &= wait_for_peers(view, round, view.staged() ? chunk : 0, lane);
      __syncwarp();
      arrived &= wait_for_peers(view, next, kGatherStep + chunk, lane);
      __syncwarp();
      fence_async_global();
      for_chunk(chunk, [&](int peer, int64_t row, Rows rows) {
        copy(static_cast<T*>(args.output) + (rows.start + row) * view.hidden, view.gathered_row(peer, row),
             streaming_policy());
      });
    }
    copier.flush();
  }
  return arrived;
}

// The fetching warp: brings every source's version of this block's rows into the ring, then the residual's.
template <typename T, Epilogue kEpilogue>
__device__ inline bool fetch_rows(const RowView<T>& view, const BlockRound& round, const RowPart& part,
                                  BulkShared& shared, char* ring) {
  const ReduceArgs& args = view.args;
  const int lane = threadIdx.x % 32;
  const int sources = view.num_sources(), items = sources + view.has_residual();
  const uint32_t buffers = uniform(shared_address(ring));
  const uint32_t full_barriers = uniform(shared_address(shared.full));
  const uint32_t empty_barriers = uniform(shared_address(shared.empty));
  RingPosition at, last;  // of the next row's first item, and of the last row's last one
  bool gave_up = false;
  // Those of a row's items that are wanted(item).
  const auto fetch = [&](int64_t row, auto&& wanted) {
    RingPosition to = at;
    // Each lane computes the address of one item, all at once.
    const T* const rows =
        part.of(lane < sources ? view.source_row(lane, row) : static_cast<const T*>(args.residual) + row * view.hidden);
    for (int item = 0; item < items; ++item, to.advance(1, args.stages)) {
      if (!wanted(item)) continue;
      const auto from = reinterpret_cast<const T*>(__shfl_sync(0xffffffffu, reinterpret_cast<uintptr_t>(rows), item));
      const uint32_t full = full_barriers + to.stage * sizeof(uint64_t);
      if (to.round > 0) barrier_wait(empty_barriers + to.stage * sizeof(uint64_t), (to.round - 1) & 1);
      if (elect()) {
        if (item == 0) shared.row[to.stage] = row;
        if (kEpilogue == Epilogue::kGather) shared.gave_up[to.stage] = gave_up;
        barrier_expect(full, part.bytes);
        if constexpr (kEpilogue == Epilogue::kGather) {
          // Published rows shall stay in the L2 cache until the peers have copied them.
          bulk_load(buffers + to.stage * part.stride, from, part.bytes, full, streaming_policy());
        } else {
          bulk_load(buffers + to.stage * part.stride, from, part.bytes, full);
        }
      }
      __syncwarp();
    }
  };
  int64_t row = view.row_block();
  // What is this rank's own need not wait for a peer.
  const auto is_own = [&](int item) { return item == sources || view.complete || item == view.rank; };
  if (row < view.own.count) fetch(row, is_own);
  bool arrived = wait_for_peers(view, round, 0, lane);
  const bool opened = __all_sync(0xffffffffu, arrived), claims = claims_rows<kEpilogue>(view);
  gave_up = !opened;
  for (int step = 0; row < view.own.count; ++step) {
    if (step % args.chunk_rows == 0) {
      if (view.staged() && step > 0) arrived &= wait_for_peers(view, round, step / args.chunk_rows, lane);
      gave_up = __any_sync(0xffffffffu, gave_up || !arrived);
      __syncwarp();  // a vote does not order memory: one lane fetches what each has acquired from its peer
      fence_async_global();
    }
    fetch(row, [&](int item) { return step > 0 || !is_own(item); });
    last = at;
    last.advance(items - 1, args.stages);
    at.advance(items, args.stages);
    const auto claim = [&] {
      int64_t next = lane == 0 ? claim_row(args.team, round) : 0;
      return __shfl_sync(0xffffffffu, next, 0);
    };
    row = claims ? claim() : view.row_of(step + 1);
    // After a fault nobody else writes the rows that are claimed here.
    for (; claims && !opened && row < view.own.count; row = claim()) {
      poison_row<T, kEpilogue>(view, view.rank, row, 0, view.hidden / kLanes<T>, lane, 32);
    }
  }
  // Chunks of which no row is this rank's are waited for all the same: what they say may be a fault.
  for (int chunk = 1; view.staged() && chunk < args.num_chunks; ++chunk) {
    arrived &= wait_for_peers(view, round, chunk, lane);
  }
  gave_up = __any_sync(0xffffffffu, gave_up || !arrived);
  if (lane == 0) {
    if (at.round > 0) barrier_wait(&shared.empty[at.stage], (at.round - 1) & 1);
    shared.row[at.stage] = -1;
    shared.gave_up[at.stage] = gave_up;
    barrier_arrive(&shared.full[at.stage]);
  }
  // Peers have their inputs back once the last row buffer has been emptied, while the last row is still being finished.
  // In rs_rmsnorm_ag the gathering says so already.
  if (view.zero_copy && kEpilogue != Epilogue::kGather && opened) {
    if (view.row_block() < view.own.count) barrier_wait(&shared.empty[last.stage], last.round & 1);
    __syncwarp();
    signal_unfenced_to_peers(args.team, round, kClosingStep, lane);
    arrived &= wait_for_readers(view, round, lane);
  }
  return arrived;
}

// The adding warps. The next source's vectors are in flight from shared memory while one source's are added.
template <typename T, int kVecs, Epilogue kEpilogue>
__device__ inline void add_rows(const RowView<T>& view, const BlockRound& round, const RowPart& part,
                                BulkShared& shared, const char* ring, const RowThreads& group) {
  const ReduceArgs& args = view.args;
  const int items = view.num_sources() + view.has_residual();
  RowWeight<T, kVecs> weight;
  if constexpr (kEpilogue != Epilogue::kSum) weight.init(view, group);
  RingPosition at;
  // The first item that is a peer's: none is fetched before all peers have arrived.
  const int first_of_peers = view.rank == 0 ? 1 : 0;
  bool gave_up = false;
  // Takes the next row buffer of the ring into registers.
  const auto take = [&](uint4(&raw)[kVecs], int item) {
    barrier_wait(&shared.full[at.stage], at.round & 1);
    if (kEpilogue == Epilogue::kGather && item == first_of_peers) gave_up |= shared.gave_up[at.stage];
    const char* from = ring + at.stage * part.stride;
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
      const bool inside = group.vector(v) * kLanes<T> < view.hidden;
      const int byte = (v * group.threads + group.thread) * kVectorBytes;
      raw[v] = inside ? *reinterpret_cast<const uint4*>(from + byte) : uint4{};
    }
    at.advance(1, args.stages);
  };
  // Gives the oldest row buffer that was taken back to the fetching warp. An arrival does not wait for loads that were
  // issued before it, and the bulk copy that overwrites the buffer may overtake them: so the arrival is made to depend
  // on the values, which have just been added anyway. Every thread for what it has read: one lane for its warp, after a
  // __syncwarp, would be no faster.
  int oldest = 0;
  const auto give_back = [&](const uint4(&raw)[kVecs]) {
    uint32_t loaded = gave_up;
#pragma unroll
    for (int v = 0; v < kVecs; ++v) loaded |= raw[v].x;
    barrier_arrive_having(&shared.empty[oldest], loaded & args.no_bits);
    if (++oldest == args.stages) oldest = 0;
  };
  int chunk = 0;
  const auto publish_gathered = [&] {
    group.sync();
    const BlockRound next = {round.epoch + 1, round.fingerprint, round.call_number, false};
    if (!gave_up) publish_to_peers(args.team, next, kGatherStep + chunk, threadIdx.x);
    ++chunk;
  };
#pragma unroll 1
  for (int step = 0;; ++step) {
    if (kEpilogue == Epilogue::kGather && step == (chunk + 1) * args.chunk_rows) publish_gathered();
    barrier_wait(&shared.full[at.stage], at.round & 1);
    const int64_t row = shared.row[at.stage];
    if (row < 0) {
      gave_up |= shared.gave_up[at.stage];
      break;
    }
    float sums[kVecs][kLanes<T>];
    uint4 raw[2][kVecs];
    take(raw[0], 0);
#pragma unroll
    for (int v = 0; v < kVecs; ++v) unpack(sums[v], raw[0][v], T{});
    give_back(raw[0]);
    if (items > 1) take(raw[0], 1);
#pragma unroll 1
    for (int item = 1; item < items; item += 2) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (item + half >= items) break;
        if (item + half + 1 < items) take(raw[1 - half], item + half + 1);
#pragma unroll
        for (int v = 0; v < kVecs; ++v) add_vector<T>(sums[v], raw[half][v]);
        give_back(raw[half]);
      }
    }
    finish_row<T, kVecs, kEpilogue>(view, row, sums, weight, group, step, !gave_up);
  }
  while (kEpilogue == Epilogue::kGather && chunk < args.num_chunks) publish_gathered();
}

template <typename T, int kVecs, Epilogue kEpilogue>
__device__ inline bool reduce_in_bulk(const RowView<T>& view, const BlockRound& round, const RowPart& part,
                                      BulkShared& shared, WarpValues& warp_values) {
  extern __shared__ __align__(128) char dynamic[];
  const int adding_threads = blockDim.x - kHelperThreads;
  char* ring = dynamic + (kEpilogue == Epilogue::kGather || view.staged() ? kCopierStages * part.stride : 0);
  if (threadIdx.x < adding_threads) {
    const RowThreads group = {adding_threads, static_cast<int>(threadIdx.x), warp_values,
                              static_cast<int>(part.first / kVectorBytes), view.args.cluster};
    add_rows<T, kVecs, kEpilogue>(view, round, part, shared, ring, group);
    return true;
  }
  const bool moves = threadIdx.x < adding_threads + 32;
  return moves ? move_rows<T, kEpilogue>(view, round, part, shared, dynamic)
               : fetch_rows<T, kEpilogue>(view, round, part, shared, ring);
}

#endif

}  // namespace tpf
