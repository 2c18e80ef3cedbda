// Launches rs_rmsnorm_kernel with the grid, the body and the width that were planned.
#pragma once
#include "../launch.cuh"
#include "rs_rmsnorm_kernel.cuh"

namespace tpf {

inline ReduceArgs reduce_args(tpf_op op, void* residual_out, const void* input, const tpf_symm* input_symm,
                              const void* residual, const void* weight, const tpf_team* team, int64_t num_tokens,
                              int32_t hidden_size, tpf_dtype dtype, float eps, float weight_offset, uint32_t variant) {
  ReduceArgs args = {};
  args.residual_out = residual_out;
  args.input = input;
  args.residual = residual;
  args.weight = weight;
  if (input_symm != nullptr) args.symm = *input_symm;
  args.team = *team;
  args.call = with_norm(reduce_call(op, dtype, num_tokens, hidden_size, input_symm, variant), eps, weight_offset);
  args.eps = eps;
  args.weight_addend = weight_addend(weight_offset);
  return args;
}

template <Epilogue kEpilogue>
struct ReduceLauncher {
  template <typename T, int kVecs, Body kBody, int kRanks = 0>
  static tpf_status launch(const ReduceArgs& args, const ReducePlan& plan, const tpf_card& card, tpf_stream stream) {
    const Grid grid = {plan.blocks, plan.threads, plan.shared_bytes, plan.cluster,
                       kBody == Body::kOneRow || kBody == Body::kAllRows};
    return launch_kernel(rs_rmsnorm_kernel<T, kVecs, kEpilogue, kBody, kRanks>, args, card, grid, stream);
  }

  template <typename T, Body kBody>
  static tpf_status launch_few_rows(const ReduceArgs& args, const ReducePlan& plan, const tpf_card& card,
                                    tpf_stream stream) {
    if constexpr (compiled_for_ranks(sizeof(T))) {
      if (plan.ranks == 2) return launch<T, 1, kBody, 2>(args, plan, card, stream);
      if (plan.ranks == 4) return launch<T, 1, kBody, 4>(args, plan, card, stream);
      if (plan.ranks == 8) return launch<T, 1, kBody, 8>(args, plan, card, stream);
    }
    return launch<T, 1, kBody>(args, plan, card, stream);
  }

  template <typename T>
  static tpf_status launch_planned(const ReduceArgs& args, const ReducePlan& plan, const tpf_card& card,
                                   tpf_stream stream) {
    switch (plan.body) {
      case Body::kOneRow:
        return launch_few_rows<T, Body::kOneRow>(args, plan, card, stream);
      case Body::kBulk:
        return plan.vectors == 2 ? launch<T, 2, Body::kBulk>(args, plan, card, stream)
                                 : launch<T, 3, Body::kBulk>(args, plan, card, stream);
      case Body::kDirect:
        return plan.vectors == 4 ? launch<T, 4, Body::kDirect>(args, plan, card, stream)
                                 : launch<T, most_vectors(sizeof(T)), Body::kDirect>(args, plan, card, stream);
      case Body::kAllRows:
        if constexpr (kEpilogue == Epilogue::kGather || kEpilogue == Epilogue::kFp8)
          return launch_few_rows<T, Body::kAllRows>(args, plan, card, stream);
    }
    return TPF_UNSUPPORTED;
  }

  static tpf_status run(ReduceArgs& args, tpf_stream stream) {
    const OnDevice on_device(args.team.device);
    if (on_device.status != TPF_OK) return on_device.status;
    const tpf_card& card = on_device.card;
    ReducePlan plan;
    if (!plan_reduce(&plan, args.call, limits_of(args.team), card)) return TPF_UNSUPPORTED;
    if (plan.posted) args.call.source = -1, args.call.buffer = 0;
    args.partition = partition_of(args.call.num_tokens, args.team.world_size);
    args.chunk_rows = plan.chunk_rows;
    args.num_chunks = plan.num_chunks;
    args.stages = plan.stages;
    args.cluster = plan.cluster;
    while (1 << args.cluster_log2 < plan.cluster) ++args.cluster_log2;
    args.fingerprint = fingerprint_of(args.call);
    switch (args.call.dtype) {
      case TPF_BF16:
        return launch_planned<__nv_bfloat16>(args, plan, card, stream);
      case TPF_F16:
        return launch_planned<__half>(args, plan, card, stream);
      case TPF_F32:
        return launch_planned<float>(args, plan, card, stream);
      default:
        return TPF_UNSUPPORTED;
    }
  }
};

}  // namespace tpf
