#include "rs_rmsnorm_launch.cuh"

tpf_status tpf_rs_rmsnorm_ag_cuda(void* output, void* residual_out, const void* input, const tpf_symm* input_symm,
                                  const void* residual, const void* weight, const tpf_team* team, int64_t num_tokens,
                                  int32_t hidden_size, tpf_dtype dtype, float eps, float weight_offset,
                                  uint32_t variant, tpf_stream stream) {
  tpf::ReduceArgs args = tpf::reduce_args(TPF_RS_RMSNORM_AG, residual_out, input, input_symm, residual, weight, team,
                                          num_tokens, hidden_size, dtype, eps, weight_offset, variant);
  args.output = output;
  return tpf::ReduceLauncher<tpf::Epilogue::kGather>::run(args, stream);
}
