#include "reduce.h"

tpf_status tpf_reduce_scatter_rows_cpu(void* output, const void* input, const tpf_symm* input_symm,
                                       const void* residual, const tpf_team* team, int64_t num_tokens,
                                       int32_t hidden_size, tpf_dtype dtype, uint32_t variant) {
  using namespace tpf;
  const tpf_call call = reduce_call(TPF_REDUCE_SCATTER_ROWS, dtype, num_tokens, hidden_size, input_symm, variant);
  Round round(*team, call);
  if (const tpf_status status = round.begin(); status != TPF_OK) return status;
  return visit(dtype, [&]<typename T>() {
    const ReductionInputs<T> in(input, input_symm, residual, hidden_size, variant);
    const tpf_status status = reduce_rows(round, static_cast<T*>(output), in, [](auto&&...) {});
    return status != TPF_OK ? status : round.end(input_symm != nullptr);
  });
}
