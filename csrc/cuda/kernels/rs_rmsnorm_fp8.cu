#include "rs_rmsnorm_launch.cuh"

tpf_status tpf_rs_rmsnorm_fp8_cuda(void* q, float* scale, void* residual_out, void* output, const void* input,
                                   const tpf_symm* input_symm, const void* residual, const void* weight,
                                   const tpf_team* team, int64_t num_tokens, int32_t hidden_size, tpf_dtype dtype,
                                   float eps, float weight_offset, int32_t group_size, int64_t scale_row_stride,
                                   int64_t scale_group_stride, uint32_t variant, tpf_stream stream) {
  tpf::ReduceArgs args = tpf::reduce_args(TPF_RS_RMSNORM_FP8, residual_out, input, input_symm, residual, weight, team,
                                          num_tokens, hidden_size, dtype, eps, weight_offset, variant);
  args.output = output;
  args.q = static_cast<uint8_t*>(q);
  args.scale = scale;
  args.scale_row_stride = scale_row_stride;
  args.scale_group_stride = scale_group_stride;
  args.call.group_size = static_cast<uint32_t>(group_size);
  return tpf::ReduceLauncher<tpf::Epilogue::kFp8>::run(args, stream);
}
