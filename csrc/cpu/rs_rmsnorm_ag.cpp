#include "gather.h"
#include "reduce.h"

tpf_status tpf_rs_rmsnorm_ag_cpu(void* output, void* residual_out, const void* input, const tpf_symm* input_symm,
                                 const void* residual, const void* weight, const tpf_team* team, int64_t num_tokens,
                                 int32_t hidden_size, tpf_dtype dtype, float eps, float weight_offset,
                                 uint32_t variant) {
  using namespace tpf;
  const tpf_call call = with_norm(reduce_call(TPF_RS_RMSNORM_AG, dtype, num_tokens, hidden_size, input_symm, variant),
                                  eps, weight_offset);
  Round round(*team, call);
  if (const tpf_status status = round.begin(); status != TPF_OK) return status;
  return visit(dtype, [&]<typename T>() {
    const Rows rows = round.rows(round.rank());
    T* own = static_cast<T*>(output) + rows.start * hidden_size;
    const Norm norm(eps, weight_offset, variant);
    const ReductionInputs<T> in(input, input_symm, residual, hidden_size, variant);
    T* sums = static_cast<T*>(residual_out);
    tpf_status status = reduce_rows(round, sums, in, [&](int64_t row) {
      norm_row(own + row * hidden_size, sums + row * hidden_size, weight, hidden_size, norm);
    });
    if (status == TPF_OK) status = round.end(input_symm != nullptr);
    if (status == TPF_OK) status = round.begin_next();
    if (status != TPF_OK) return status;
    const int64_t row_bytes = hidden_size * sizeof(T);
    if (rows.count > 0) std::memcpy(round.slot(round.rank()), own, rows.count * row_bytes);
    if (status = round.meet(0); status != TPF_OK) return status;
    gather_rows(round, static_cast<char*>(output), reinterpret_cast<const char*>(own), row_bytes);
    return round.end(false);
  });
}
