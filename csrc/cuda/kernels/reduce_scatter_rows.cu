#include "rs_rmsnorm_launch.cuh"

tpf_status tpf_reduce_scatter_rows_cuda(void* output, const void* input, const tpf_symm* input_symm,
                                        const void* residual, const tpf_team* team, int64_t num_tokens,
                                        int32_t hidden_size, tpf_dtype dtype, uint32_t variant, tpf_stream stream) {
  tpf::ReduceArgs args = tpf::reduce_args(TPF_REDUCE_SCATTER_ROWS, output, input, input_symm, residual, nullptr, team,
                                          num_tokens, hidden_size, dtype, 0.0f, 0.0f, variant);
  return tpf::ReduceLauncher<tpf::Epilogue::kSum>::run(args, stream);
}
