#include "reduce.h"

tpf_status tpf_rs_rmsnorm_fp8_cpu(void* q, float* scale, void* residual_out, void* output, const void* input,
                                  const tpf_symm* input_symm, const void* residual, const void* weight,
                                  const tpf_team* team, int64_t num_tokens, int32_t hidden_size, tpf_dtype dtype,
                                  float eps, float weight_offset, int32_t group_size, int64_t scale_row_stride,
                                  int64_t scale_group_stride, uint32_t variant) {
  using namespace tpf;
  if ((variant & TPF_GATHERED) != 0) return TPF_UNSUPPORTED;
  tpf_call call = with_norm(reduce_call(TPF_RS_RMSNORM_FP8, dtype, num_tokens, hidden_size, input_symm, variant), eps,
                            weight_offset);
  call.group_size = static_cast<uint32_t>(group_size);
  Round round(*team, call);
  if (const tpf_status status = round.begin(); status != TPF_OK) return status;
  return visit(dtype, [&]<typename T>() {
    alignas(64) T normed[TPF_MAX_HIDDEN_SIZE];
    const Norm norm(eps, weight_offset, variant);
    const ReductionInputs<T> in(input, input_symm, residual, hidden_size, variant);
    T* sums = static_cast<T*>(residual_out);
    const tpf_status status = reduce_rows(round, sums, in, [&](int64_t row) {
      T* out = (variant & TPF_KEEP_OUTPUT) != 0 ? static_cast<T*>(output) + row * hidden_size : normed;
      norm_row(out, sums + row * hidden_size, weight, hidden_size, norm);
      quantize_row(static_cast<uint8_t*>(q) + row * hidden_size, scale + row * scale_row_stride, scale_group_stride,
                   out, hidden_size, group_size, (variant & TPF_ROUND_SCALES) != 0);
    });
    return status != TPF_OK ? status : round.end(input_symm != nullptr);
  });
}

tpf_status tpf_quantize_rows_cpu(const tpf_quantization* to, const void* rows, int64_t num_rows, int32_t columns,
                                 tpf_dtype dtype) {
  using namespace tpf;
  return visit(dtype, [&]<typename T>() {
    for (int64_t row = 0; row < num_rows; ++row) {
      quantize_row(to->q + row * columns, to->scale + row * to->scale_row_stride, to->scale_group_stride,
                   static_cast<const T*>(rows) + row * columns, columns, to->group_size, to->round_scales != 0);
    }
    return TPF_OK;
  });
}
