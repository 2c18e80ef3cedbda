#include "reduce.h"

namespace tpf {
namespace {

// One row to e4m3 with a scale of amax / 448 for every `group_size` columns; a group of zeros has scale 0.
template <typename T>
void quantize_row(uint8_t* q, float* scale, int64_t scale_group_stride, const T* row, int hidden_size, int group_size) {
  for (int begin = 0; begin < hidden_size; begin += group_size) {
    const int count = std::min(group_size, hidden_size - begin);
    float amax = 0;
    for (int i = 0; i < count; ++i) amax = std::max(amax, std::fabs(to_float(row[begin + i])));
    scale[begin / group_size * scale_group_stride] = amax / 448.0f;
    const float inverse = amax > 0 ? 448.0f / amax : 0.0f;
    for (int i = 0; i < count; ++i) q[begin + i] = to_e4m3(to_float(row[begin + i]) * inverse);
  }
}

}  // namespace
}  // namespace tpf

tpf_status tpf_rs_rmsnorm_fp8_cpu(void* q, float* scale, void* residual_out, void* output, const void* input,
                                  const tpf_symm* input_symm, const void* residual, const void* weight,
                                  const tpf_team* team, int64_t num_tokens, int32_t hidden_size, tpf_dtype dtype,
                                  float eps, int32_t group_size, int64_t scale_row_stride, int64_t scale_group_stride,
                                  int32_t complete) {
  using namespace tpf;
  tpf_call call = reduce_call(TPF_RS_RMSNORM_FP8, dtype, num_tokens, hidden_size, input_symm, residual, complete);
  call.group_size = static_cast<uint32_t>(group_size);
  call.variant |= (scale_row_stride == 1 ? TPF_COLUMN_SCALES : 0u) | (output != nullptr ? TPF_KEEP_OUTPUT : 0u);
  Round round(*team, call);
  if (const tpf_status status = round.begin(); status != TPF_OK) return status;
  return visit(dtype, [&]<typename T>() {
    alignas(64) T normed[TPF_MAX_HIDDEN_SIZE];
    const Reduction<T> in = {static_cast<const T*>(input), input_symm, static_cast<const T*>(residual), hidden_size,
                             complete != 0};
    const tpf_status status =
        reduce_rows(round, static_cast<T*>(residual_out), in, [&](int64_t row, const float* values, SquareSum& squares) {
          T* out = output != nullptr ? static_cast<T*>(output) + row * hidden_size : normed;
          scale_row(out, values, static_cast<const T*>(weight), squares.rstd(hidden_size, eps), hidden_size);
          quantize_row(static_cast<uint8_t*>(q) + row * hidden_size, scale + row * scale_row_stride, scale_group_stride,
                       out, hidden_size, group_size);
        });
    return status != TPF_OK ? status : round.end(input_symm != nullptr);
  });
}
