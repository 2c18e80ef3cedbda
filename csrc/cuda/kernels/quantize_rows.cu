// quantize_rows_kernel: rows that a rank has to e4m3, as rs_rmsnorm_fp8 does on the way. A warp has a group of columns.
#include "../../protocol.h"
#include "../launch.cuh"
#include "../ptx/vec.cuh"

namespace tpf {
namespace {

constexpr int kQuantizeThreads = 256;

struct QuantizeArgs {
  tpf_quantization to;
  const __nv_bfloat16* rows;
  int64_t num_rows;
  int32_t columns, groups;
};

__global__ void __launch_bounds__(kQuantizeThreads) quantize_rows_kernel(const __grid_constant__ QuantizeArgs args) {
  constexpr int kWarps = kQuantizeThreads / 32, kEach = kQuantizedColumns / 32;
  const int lane = threadIdx.x % 32;
  const int64_t warp = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32, warps = int64_t{gridDim.x} * kWarps;
  for (int64_t task = warp; task < args.num_rows * args.groups; task += warps) {
    const int64_t row = task / args.groups, group = task % args.groups;
    const int64_t first = row * args.columns + group * kQuantizedColumns;
    const int columns = min(kQuantizedColumns, static_cast<int>(args.columns - group * kQuantizedColumns));
    float values[kEach], amax = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int column = i * 32 + lane;
      values[i] = column < columns ? static_cast<float>(args.rows[first + column]) : 0.0f;
      amax = fmaxf(amax, fabsf(values[i]));
    }
    const Fp8Scale scale(warp_reduce(amax, Max{}), args.to.round_scales != 0);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int column = i * 32 + lane;
      if (column < columns) {
        args.to.q[first + column] = __nv_cvt_float_to_fp8(values[i] * scale.inverse, __NV_SATFINITE, __NV_E4M3);
      }
    }
    if (lane == 0) args.to.scale[row * args.to.scale_row_stride + group * args.to.scale_group_stride] = scale.scale;
  }
}

}  // namespace
}  // namespace tpf

tpf_status tpf_quantize_rows_cuda(const tpf_quantization* to, const void* rows, int64_t num_rows, int32_t columns,
                                  tpf_dtype dtype, int32_t device, tpf_stream stream) {
  using namespace tpf;
  if (dtype != TPF_BF16 || to->group_size != kQuantizedColumns) return TPF_UNSUPPORTED;
  const OnDevice on_device(device);
  if (on_device.status != TPF_OK) return on_device.status;
  const tpf_card& card = on_device.card;
  const QuantizeArgs args = {*to, static_cast<const __nv_bfloat16*>(rows), num_rows, columns,
                             (columns + kQuantizedColumns - 1) / kQuantizedColumns};
  const int64_t blocks = (num_rows * args.groups * 32 + kQuantizeThreads - 1) / kQuantizeThreads;
  if (blocks == 0) return TPF_OK;
  const Grid grid = {static_cast<int>(std::min<int64_t>(blocks, 4 * card.sm_count)), kQuantizeThreads};
  return launch_kernel(quantize_rows_kernel, args, card, grid, stream);
}
