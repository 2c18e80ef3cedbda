// all_gather_rows_kernel: every rank lays its rows open in its own slot, then copies the others'. The rows of a rank
// are one run of bytes; block b of every rank handles pieces b, b + grid, ... of it, so block b needs to hear from the
// peers' blocks b alone.
#include "launch.cuh"
#include "signal.cuh"
#include "vec.cuh"

namespace tpf {
namespace {

constexpr int kThreads = 512;
constexpr int kDepth = 4;  // vectors of a thread that are on their way at once
constexpr int64_t kPieceBytes = int64_t{kThreads} * kDepth * 16;

struct GatherArgs {
  char* output;
  const char* input;
  tpf_team team;
  tpf_call call;
  uint32_t contract;
  int64_t row_bytes;
  Partition partition;
};

// Copies `bytes` with all threads of the block, 16 bytes at a time where both ends allow it.
__device__ void copy_piece(char* to, const char* from, int64_t bytes) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes) % 16 != 0) {
    for (int64_t at = threadIdx.x; at < bytes; at += kThreads) to[at] = *(volatile const char*)(from + at);
    return;
  }
  uint4 raw[kDepth];
#pragma unroll
  for (int i = 0; i < kDepth; ++i) {
    const int64_t at = (int64_t{i} * kThreads + threadIdx.x) * 16;
    raw[i] = at < bytes ? load16(from + at) : uint4{};
  }
#pragma unroll
  for (int i = 0; i < kDepth; ++i) {
    const int64_t at = (int64_t{i} * kThreads + threadIdx.x) * 16;
    if (at < bytes) store16(to + at, raw[i]);
  }
}

__global__ void __launch_bounds__(kThreads, 1) all_gather_rows_kernel(const __grid_constant__ GatherArgs args) {
  const tpf_team& team = args.team;
  const BlockRound round = begin_op(team, args.call, args.contract, 1);
  const auto rows = [&](int rank) { return args.partition.rows(rank); };
  const auto for_pieces = [&](int rank, auto&& copy) {
    const int64_t bytes = rows(rank).count * args.row_bytes;
    for (int64_t at = blockIdx.x * kPieceBytes; at < bytes; at += gridDim.x * kPieceBytes) {
      copy(at, min(kPieceBytes, bytes - at));
    }
  };
  bool arrived = !round.refused;
  if (arrived) {
    char* own = slot(team.region[team.rank], round.epoch, team.slot_bytes);
    char* own_output = args.output + rows(team.rank).start * args.row_bytes;
    for_pieces(team.rank, [&](int64_t at, int64_t bytes) { copy_piece(own + at, args.input + at, bytes); });
    __syncthreads();
    const int peer = threadIdx.x;
    const bool has_peer = peer < team.world_size && peer != team.rank;
    if (has_peer) publish_step(team, round, 0, peer);
    for_pieces(team.rank, [&](int64_t at, int64_t bytes) { copy_piece(own_output + at, args.input + at, bytes); });
    if (has_peer) arrived = wait_step(team, args.call, round, 0, peer);
    arrived = __syncthreads_and(arrived);
    // Each rank begins with the next one, so that they do not all read from the same.
    for (int offset = 1; offset < team.world_size; ++offset) {
      const int source = (team.rank + offset) % team.world_size;
      const char* from = slot(team.region[source], round.epoch, team.slot_bytes);
      char* to = args.output + rows(source).start * args.row_bytes;
      for_pieces(source, [&](int64_t at, int64_t bytes) { copy_piece(to + at, from + at, bytes); });
    }
  }
  if (arrived) return;
  const int64_t bytes = args.call.num_tokens * args.row_bytes;  // NaN in every dtype that has one
  for (int64_t at = blockIdx.x * kThreads + threadIdx.x; at < bytes; at += gridDim.x * kThreads) args.output[at] = ~0;
}

}  // namespace
}  // namespace tpf

tpf_status tpf_all_gather_rows_cuda(void* output, const void* input, const tpf_team* team, int64_t num_tokens,
                                    int32_t hidden_size, tpf_dtype dtype, tpf_stream stream) {
  using namespace tpf;
  Device device;
  if (const tpf_status status = use_device(&device, team->device); status != TPF_OK) return status;
  GatherArgs args = {};
  args.output = static_cast<char*>(output);
  args.input = static_cast<const char*>(input);
  args.team = *team;
  args.call = gather_call(dtype, num_tokens, hidden_size);
  args.contract = contract_of(args.call);
  args.row_bytes = hidden_size * bytes_of(dtype);
  args.partition = partition_of(num_tokens, team->world_size);
  const int64_t largest = args.partition.largest() * args.row_bytes;
  const Blocks blocks = share_out((largest + kPieceBytes - 1) / kPieceBytes, team->max_ctas);
  return launch_kernel(all_gather_rows_kernel, args, device, {blocks.grid, kThreads}, stream);
}
