// Quantised rows and their scales, as results of an op.
#pragma once
#include "torch_call.h"

namespace tpf {

// Adds the scales of so many rows: row-major, or column-major with columns of whole vectors of 16 bytes.
inline bool add_scale(const Call& in, int64_t rows, int64_t columns, int64_t group_size, bool column_major,
                      tpf_quantization* to, Results* results) {
  const int64_t groups = (columns + group_size - 1) / group_size, pitch = (rows + 3) / 4 * 4;
  void* scale;
  if (!(column_major ? results->add_column_major(&scale, in.input, rows, groups, pitch)
                     : results->add(&scale, in.input, rows, groups, TPF_F32))) {
    return false;
  }
  to->scale = static_cast<float*>(scale);
  to->scale_row_stride = column_major ? 1 : groups;
  to->scale_group_stride = column_major ? pitch : 1;
  to->group_size = static_cast<int32_t>(group_size);
  return true;
}

// Adds so many rows of e4m3, and their scales.
inline bool add_quantized(const Call& in, int64_t rows, int64_t columns, int64_t group_size, bool column_major,
                          bool round_scales, tpf_quantization* to, Results* results) {
  void* q;
  if (!results->add(&q, in.input, rows, columns, TPF_E4M3)) return false;
  to->q = static_cast<uint8_t*>(q);
  to->round_scales = round_scales;
  return add_scale(in, rows, columns, group_size, column_major, to, results);
}

// Rows that this rank has to e4m3.
inline bool quantize_rows(const Call& call, const tpf_quantization& to, const void* rows, int64_t num_rows,
                          int64_t columns, int dtype) {
  const auto launch = [&](auto* op, auto... last) {
    return op(&to, rows, num_rows, static_cast<int32_t>(columns), static_cast<tpf_dtype>(dtype), last...);
  };
  return call.run(
      [&](void* stream) { return launch(TPF_CUDA_OP(tpf_quantize_rows_cuda), call.team()->device, stream); },
      [&] { return launch(tpf_quantize_rows_cpu); });
}

}  // namespace tpf
