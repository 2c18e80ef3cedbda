// Chooses the grid, the body and the width of rs_rmsnorm_kernel, and launches it.
#pragma once
#include "launch.cuh"
#include "rs_rmsnorm_kernel.cuh"

namespace tpf {

inline ReduceArgs reduce_args(tpf_op op, void* residual_out, const void* input, const tpf_symm* input_symm,
                              const void* residual, const void* weight, const tpf_team* team, int64_t num_tokens,
                              int32_t hidden_size, tpf_dtype dtype, float eps, uint32_t variant) {
  ReduceArgs args = {};
  args.residual_out = residual_out;
  args.input = input;
  args.residual = residual;
  args.weight = weight;
  if (input_symm != nullptr) args.symm = *input_symm;
  args.team = *team;
  args.call = reduce_call(op, dtype, num_tokens, hidden_size, input_symm, variant);
  args.eps = eps;
  return args;
}

constexpr int kPartsToPost = 4;
// A block's row buffers, where these are enough for a row of every source. More bytes on their way are no gain, and
// with half of the card's SMs a loss: 932 us instead of 862 with 8 blocks a rank, 16384 tokens and 16 rows (H100).
constexpr int64_t kRingBytes = 128 << 10;

template <Ending kEnding>
struct ReduceLauncher {
  static int64_t row_bytes(const ReduceArgs& args) {
    return args.call.hidden_size * bytes_of(static_cast<tpf_dtype>(args.call.dtype));
  }
  static bool is_staged(const ReduceArgs& args) {
    return args.call.source < 0 && args.team.world_size > 1 && (args.call.variant & TPF_COMPLETE) == 0;
  }
  // Whether all that a rank is sent fits its inbox.
  static bool fits_inbox(const ReduceArgs& args) {
    return args.team.world_size * args.partition.largest() * row_bytes(args) <= inbox_bytes(args.team.slot_bytes);
  }
  // Row buffers that the moving warp copies through.
  static int copier_rows(const ReduceArgs& args) {
    return kEnding == Ending::kGather || (args.call.source < 0 && args.team.world_size > 1) ? kCopierStages : 0;
  }

  // Launches a body, unless it takes more threads than it may have for each to hold kVecs vectors of a row.
  template <typename T, int kVecs, Body kBody>
  static tpf_status launch(const ReduceArgs& args, const Device& device, int blocks, tpf_stream stream) {
    constexpr bool kBulk = kBody == Body::kBulk;
    const int threads = (warps(args) + kVecs * args.parts - 1) / (kVecs * args.parts) * 32;
    if (threads > most_threads(kBody, sizeof(T), device.is_sm90)) return TPF_UNSUPPORTED;
    Grid grid = {blocks * args.parts, threads + (kBulk ? kHelperThreads : 0)};
    grid.shared_bytes = kBulk ? (copier_rows(args) + args.stages) * row_bytes(args) : 0;
    grid.cluster = args.parts;
    grid.early = kBody == Body::kOneRow;
    return launch_kernel(rs_rmsnorm_kernel<T, kVecs, kEnding, kBody>, args, device, grid, stream);
  }

  // Warps that hold one vector of a row a thread.
  static int warps(const ReduceArgs& args) { return static_cast<int>((row_bytes(args) / 16 + 31) / 32); }

  // With the copy engine, where the ring holds every source's version of at least one row: fetch_rows relies on it.
  template <typename T>
  static tpf_status choose_bulk(ReduceArgs& args, const Device& device, int grid, tpf_stream stream) {
    if (!device.is_sm90 || args.chunk_rows < 2) return TPF_UNSUPPORTED;
    const int64_t rows = (device.shared_bytes - kStaticSharedBytes) / row_bytes(args) - copier_rows(args);
    const int64_t least = args.team.world_size + 1;
    if (rows < least) return TPF_UNSUPPORTED;
    args.stages =
        static_cast<int>(std::min({int64_t{kMaxStages}, rows, std::max(least, kRingBytes / row_bytes(args))}));
    const tpf_status status = launch<T, 2, Body::kBulk>(args, device, grid, stream);
    return status == TPF_UNSUPPORTED ? launch<T, 3, Body::kBulk>(args, device, grid, stream) : status;
  }

  // Blocks of a cluster that share a row: as many as there may be, down to four warps each. What a small call waits for
  // most is the way of its rows through the SMs.
  static int row_parts(const ReduceArgs& args, const Device& device, int rows) {
    int parts = 1;
    while (device.is_sm90 && parts < kMaxParts && 2 * parts * rows <= most_blocks(args.team.max_ctas) &&
           cluster_fits(args.team, 2 * parts, 2 * parts * rows) && warps(args) >= 8 * parts) {
      parts *= 2;
    }
    return parts;
  }

  template <typename T>
  static tpf_status choose_body(ReduceArgs& args, const Device& device, int grid, tpf_stream stream) {
    tpf_status status = args.chunk_rows <= 1 ? launch<T, 1, Body::kOneRow>(args, device, grid, stream)
                                             : choose_bulk<T>(args, device, grid, stream);
    if (status != TPF_UNSUPPORTED) return status;
    args.parts = 1;
    status = launch<T, 4, Body::kDirect>(args, device, grid, stream);
    constexpr int kMany = sizeof(T) == 4 ? 16 : 8;
    static_assert(most_threads(Body::kDirect, sizeof(T), false) * kMany * kLanes<T> >= TPF_MAX_HIDDEN_SIZE);
    return status == TPF_UNSUPPORTED ? launch<T, kMany, Body::kDirect>(args, device, grid, stream) : status;
  }

  static tpf_status run(ReduceArgs& args, tpf_stream stream) {
    Device device;
    if (const tpf_status status = use_device(&device, args.team.device); status != TPF_OK) return status;
    // The grid depends on the call and on what the workspace was made with: the same on all ranks.
    args.partition = partition_of(args.call.num_tokens, args.team.world_size);
    const Blocks blocks = share_out(args.partition.largest(), args.team.max_ctas);
    // Staged rows that fit no inbox are for the bodies that stage in slots, one row a block or not. Between cards,
    // gathering a chunk takes long enough for fewer and larger ones to be faster.
    int least = fits_inbox(args) || !is_staged(args) ? std::min(blocks.rows, 2) : 2;
    if (kEnding == Ending::kGather && !is_staged(args) && blocks.grid > kHalfACard) least = std::min(blocks.rows, 8);
    args.chunk_rows = std::max((blocks.rows + kMaxChunks - 1) / kMaxChunks, least);
    args.parts = 1;
    if (blocks.rows <= 1) {
      args.parts = row_parts(args, device, blocks.grid);
      // A small piece of a row is posted: one way between cards, where an input read in place takes two.
      if (args.parts >= kPartsToPost && fits_inbox(args)) args.call.source = -1, args.call.buffer = 0;
    }
    args.contract = contract_of(args.call);
    args.num_chunks = std::max(1, (blocks.rows + args.chunk_rows - 1) / std::max(1, args.chunk_rows));
    switch (args.call.dtype) {
      case TPF_BF16:
        return choose_body<__nv_bfloat16>(args, device, blocks.grid, stream);
      case TPF_F16:
        return choose_body<__half>(args, device, blocks.grid, stream);
      case TPF_F32:
        return choose_body<float>(args, device, blocks.grid, stream);
      default:
        return TPF_UNSUPPORTED;
    }
  }
};

}  // namespace tpf
