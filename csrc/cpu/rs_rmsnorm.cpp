#include "reduce.h"

tpf_status tpf_rs_rmsnorm_cpu(void* output, void* residual_out, const void* input, const tpf_symm* input_symm,
                              const void* residual, const void* weight, const tpf_team* team, int64_t num_tokens,
                              int32_t hidden_size, tpf_dtype dtype, float eps, float weight_offset, uint32_t variant) {
  using namespace tpf;
  const tpf_call call =
      with_norm(reduce_call(TPF_RS_RMSNORM, dtype, num_tokens, hidden_size, input_symm, variant), eps, weight_offset);
  Round round(*team, call);
  if (const tpf_status status = round.begin(); status != TPF_OK) return status;
  return visit(dtype, [&]<typename T>() {
    const Norm norm(eps, weight_offset, variant);
    const ReductionInputs<T> in(input, input_symm, residual, hidden_size, variant);
    T* sums = static_cast<T*>(residual_out);
    const tpf_status status = reduce_rows(round, sums, in, [&](int64_t row) {
      norm_row(static_cast<T*>(output) + row * hidden_size, sums + row * hidden_size, weight, hidden_size, norm);
    });
    return status != TPF_OK ? status : round.end(input_symm != nullptr);
  });
}
