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

template <Ending kEnding>
struct ReduceLauncher {
  template <typename T, int kVecs, bool kBulk>
  static tpf_status launch(const ReduceArgs& args, const Device& device, int grid, int threads, tpf_stream stream) {
    const size_t shared_bytes = kBulk ? (copier_rows(args) + args.stages) * row_bytes(args) : 0;
    return launch_kernel(rs_rmsnorm_kernel<T, kVecs, kEnding, kBulk>, args, device, grid,
                         threads + (kBulk ? kHelperThreads : 0), shared_bytes, stream);
  }

  static int64_t row_bytes(const ReduceArgs& args) {
    return args.call.hidden_size * bytes_of(static_cast<tpf_dtype>(args.call.dtype));
  }
  // Row buffers that the moving warp copies through.
  static int copier_rows(const ReduceArgs& args) {
    return kEnding == Ending::kGather || (args.call.source < 0 && args.team.world_size > 1) ? kCopierStages : 0;
  }

  // Threads that hold `vecs` vectors of a row each; 0 where that is more than `most`.
  static int adding_threads(const ReduceArgs& args, int vecs, int most) {
    const int64_t threads = (row_bytes(args) / 16 + vecs * 32 - 1) / (vecs * 32) * 32;
    return threads <= most ? static_cast<int>(threads) : 0;
  }

  // With the copy engine, where the ring holds every source's version of at least one row: fetch_rows relies on it.
  template <typename T>
  static tpf_status choose_bulk(ReduceArgs& args, const Device& device, int grid, tpf_stream stream) {
    if (!device.has_bulk_copies || args.chunk_rows < 2) return TPF_UNSUPPORTED;
    const int64_t rows = (device.shared_bytes - kStaticSharedBytes) / row_bytes(args) - copier_rows(args);
    args.stages = static_cast<int>(std::min<int64_t>(kMaxStages, rows));
    if (args.stages <= args.team.world_size) return TPF_UNSUPPORTED;
    if (const int threads = adding_threads(args, 2, kMaxAddingThreads)) {
      return launch<T, 2, true>(args, device, grid, threads, stream);
    }
    if (const int threads = adding_threads(args, 3, kMaxAddingThreads)) {
      return launch<T, 3, true>(args, device, grid, threads, stream);
    }
    return TPF_UNSUPPORTED;
  }

  template <typename T>
  static tpf_status choose_body(ReduceArgs& args, const Device& device, int grid, tpf_stream stream) {
    const tpf_status status = choose_bulk<T>(args, device, grid, stream);
    if (status != TPF_UNSUPPORTED) return status;
    if (const int threads = adding_threads(args, 2, kMaxAddingThreads)) {
      return launch<T, 2, false>(args, device, grid, threads, stream);
    }
    constexpr int kMany = sizeof(T) == 4 ? 16 : 8;
    static_assert(kFewThreads * kMany * kLanes<T> >= TPF_MAX_HIDDEN_SIZE);
    return launch<T, kMany, false>(args, device, grid, adding_threads(args, kMany, kFewThreads), stream);
  }

  static tpf_status run(ReduceArgs& args, tpf_stream stream) {
    Device device;
    if (const tpf_status status = use_device(&device, args.team.device); status != TPF_OK) return status;
    // The grid depends on the call and on what the workspace was made with: the same on all ranks.
    args.largest_share = rows_of(args.call.num_tokens, 0, args.team.world_size).count;
    const Blocks blocks = share_out(args.largest_share, args.team.max_ctas);
    // One row a block: to stage it costs less than the second synchronisation of an input that is read in place.
    if (blocks.rows <= 1) args.call.source = -1;
    args.contract = contract_of(args.call);
    args.chunk_rows = std::max((blocks.rows + kMaxChunks - 1) / kMaxChunks, std::min(blocks.rows, 2));
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
