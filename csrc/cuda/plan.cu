// What an op would launch: the op itself is called, with nothing to work on, and its launch is written down.
#include "launch.cuh"

tpf_plan*& tpf::plan_instead() {
  static thread_local tpf_plan* plan = nullptr;
  return plan;
}

namespace {

// Product and gather in one kernel or, where that does not serve, what gathers after a product.
tpf_status project_and_gather(const tpf_call& call, const tpf_team* team) {
  void* const outputs[3] = {};
  const tpf_projection projection = {};
  if (tpf_qkv_a_proj_ag_cuda(outputs, &projection, team, &call, nullptr) == TPF_OK) return TPF_OK;
  const int32_t few_rows = tpf::plan_instead()->few_rows;
  const tpf_status status = call.op == TPF_QKV_A_PROJ_AG_NORM
                                ? tpf_gather_latent_norm_cuda(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr,
                                                              team, &call, 0, 0, 1.0f, nullptr)
                                : tpf_gather_latent_cuda(nullptr, nullptr, team, &call, nullptr);
  tpf::plan_instead()->few_rows = few_rows;
  return status;
}

tpf_status call(tpf_op op, const tpf_symm* symm, const tpf_team* team, int64_t num_tokens, int32_t hidden_size,
                int32_t columns, tpf_dtype dtype) {
  constexpr int32_t kGroupSize = 128;
  switch (op) {
    case TPF_RS_RMSNORM:
      return tpf_rs_rmsnorm_cuda(nullptr, nullptr, nullptr, symm, nullptr, nullptr, team, num_tokens, hidden_size,
                                 dtype, 1.0f, 0, nullptr);
    case TPF_RS_RMSNORM_FP8:
      return tpf_rs_rmsnorm_fp8_cuda(nullptr, nullptr, nullptr, nullptr, nullptr, symm, nullptr, nullptr, team,
                                     num_tokens, hidden_size, dtype, 1.0f, kGroupSize, 0, 0, 0, nullptr);
    case TPF_RS_RMSNORM_AG:
      return tpf_rs_rmsnorm_ag_cuda(nullptr, nullptr, nullptr, symm, nullptr, nullptr, team, num_tokens, hidden_size,
                                    dtype, 1.0f, 0, nullptr);
    case TPF_REDUCE_SCATTER_ROWS:
      return tpf_reduce_scatter_rows_cuda(nullptr, nullptr, symm, team, num_tokens, hidden_size, dtype, nullptr);
    case TPF_ALL_GATHER_ROWS:
      return tpf_all_gather_rows_cuda(nullptr, nullptr, team, num_tokens, hidden_size, dtype, nullptr);
    case TPF_QKV_A_PROJ_AG:
    case TPF_QKV_A_PROJ_AG_FP8:
    case TPF_QKV_A_PROJ_AG_NORM:
      return project_and_gather(tpf::projection_call(op, dtype, num_tokens, hidden_size, columns), team);
    default:
      return TPF_UNSUPPORTED;
  }
}

}  // namespace

tpf_status tpf_plan_cuda(tpf_plan* plan, tpf_op op, const tpf_symm* input_symm, const tpf_team* team,
                         int64_t num_tokens, int32_t hidden_size, int32_t columns, tpf_dtype dtype) {
  tpf::plan_instead() = plan;
  const tpf_status status = call(op, input_symm, team, num_tokens, hidden_size, columns, dtype);
  tpf::plan_instead() = nullptr;
  return status;
}
