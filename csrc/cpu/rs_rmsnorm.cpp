#include "reduce.h"

tpf_status tpf_rs_rmsnorm_cpu(void* output, void* residual_out, const void* input, const tpf_symm* input_symm,
                              const void* residual, const void* weight, const tpf_team* team, int64_t num_tokens,
                              int32_t hidden_size, tpf_dtype dtype, float eps, int32_t complete) {
  using namespace tpf;
  const tpf_call call = reduce_call(TPF_RS_RMSNORM, dtype, num_tokens, hidden_size, input_symm, residual, complete);
  Round round(*team, call);
  if (const tpf_status status = round.begin(); status != TPF_OK) return status;
  return visit(dtype, [&]<typename T>() {
    const Reduction<T> in = {static_cast<const T*>(input), input_symm, static_cast<const T*>(residual), hidden_size,
                             complete != 0};
    const tpf_status status =
        reduce_rows(round, static_cast<T*>(residual_out), in, [&](int64_t row, const float* values, SquareSum& squares) {
          scale_row(static_cast<T*>(output) + row * hidden_size, values, static_cast<const T*>(weight),
                    squares.rstd(hidden_size, eps), hidden_size);
        });
    return status != TPF_OK ? status : round.end(input_symm != nullptr);
  });
}
