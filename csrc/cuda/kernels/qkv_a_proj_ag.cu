#include <cudaTypedefs.h>

#include "../launch.cuh"
#include "qkv_a_proj_ag_columns.h"
#include "qkv_a_proj_ag_kernel.cuh"

namespace tpf {
namespace {

PFN_cuTensorMapEncodeTiled_v12000 encoder() {
  static const auto found =
      reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(driver_function("cuTensorMapEncodeTiled", 12000));
  return found;
}

// Boxes of `box_rows` rows by 128 bytes of a row-major [rows, hidden_size]; what lies outside reads as 0.
bool encode(CUtensorMap* map, const tpf_call& call, const void* base, int64_t rows, uint32_t box_rows) {
  const CUtensorMapDataType type = call.dtype == TPF_BF16  ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                   : call.dtype == TPF_F16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                           : CU_TENSOR_MAP_DATA_TYPE_UINT8;
  const cuuint64_t element_bytes = bytes_of(static_cast<tpf_dtype>(call.dtype));
  const cuuint64_t sizes[2] = {call.hidden_size, static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {call.hidden_size * element_bytes};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(kSwizzleBytes / element_bytes), box_rows};
  const cuuint32_t steps[2] = {1, 1};
  return encoder()(map, type, 2, const_cast<void*>(base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                   CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

bool begins_at_16_bytes(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <typename Tiles>
tpf_status launch(ProjectionArgs& args, const ProjectionPlan& plan, const tpf_card& card,
                  const tpf_projection& projection, tpf_stream stream) {
  using Out = std::conditional_t<Tiles::kScaled, __nv_bfloat16, typename Tiles::In>;
  const int64_t rows = args.partition.rows(args.team.rank).count;
  if (!encode(&args.weight_map, args.call, projection.weight, args.call.columns, Tiles::kWeightBox) ||
      (Tiles::kTail > 0 && !encode(&args.tail_map, args.call, projection.weight, args.call.columns, Tiles::kTail)) ||
      (rows > 0 && !encode(&args.input_map, args.call, projection.input, rows, Tiles::kRows))) {
    return TPF_UNSUPPORTED;
  }
  const Grid grid = {plan.blocks, kProjectionThreads, plan.shared_bytes, plan.cluster};
  return is_normed(args.call) ? launch_kernel(qkv_a_proj_ag_kernel<Tiles, Out, true>, args, card, grid, stream)
                              : launch_kernel(qkv_a_proj_ag_kernel<Tiles, Out, false>, args, card, grid, stream);
}

// With the tiles that were planned, one of these kinds.
template <typename In, TileKind... kKinds>
tpf_status launch_planned(TileKinds<kKinds...>, ProjectionArgs& args, const ProjectionPlan& plan, const tpf_card& card,
                          const tpf_projection& projection, tpf_stream stream) {
  tpf_status status = TPF_UNSUPPORTED;
  ((plan.tile == kKinds && (status = launch<TilesOf<In, kKinds>>(args, plan, card, projection, stream), true)) || ...);
  return status;
}

}  // namespace
}  // namespace tpf

tpf_status tpf_qkv_a_proj_ag_cuda(void* const outputs[3], const tpf_projection* projection, const tpf_team* team,
                                  const tpf_call* call, tpf_stream stream) {
  using namespace tpf;
  const OnDevice on_device(team->device);
  if (on_device.status != TPF_OK) return on_device.status;
  const tpf_card& card = on_device.card;
  bool aligned = begins_at_16_bytes(projection->input) && begins_at_16_bytes(projection->weight);
  for (int i = 0; i < 3; ++i) aligned = aligned && begins_at_16_bytes(outputs[i]);
  const bool quantizes = quantizes_q_a(*call);
  if ((projection->q_a_scale != nullptr) != quantizes || (call->dtype == TPF_E4M3 && projection->weight_offset != 0)) {
    return TPF_UNSUPPORTED;
  }
  const ColumnsPlan columns = plan_columns(*call, aligned, limits_of(*team), card);
  if (columns.serves) return launch_columns(outputs, *projection, *team, *call, columns, card, stream);
  const ProjectionPlan plan = plan_projection(*call, aligned, limits_of(*team), card);
  if (!plan.fused || encoder() == nullptr) return TPF_UNSUPPORTED;
  const int q_a_groups = quantizes ? call->q_columns / kQuantizedColumns : 0;
  if (quantizes && (!begins_at_16_bytes(projection->q_a_scale) || projection->q_a_scale_row_stride != q_a_groups ||
                    projection->q_a_scale_group_stride != 1)) {
    return TPF_UNSUPPORTED;
  }
  ProjectionArgs args = {};
  // Of fp8, too, the gathered rows have 16 bits, but for q_a where it is quantised.
  const int64_t item = bytes_of(latent_dtype(*call)), rest = call->columns - call->q_columns - call->kv_columns;
  const auto add_part = [&](int part, void* output, int64_t bytes) {
    args.outputs[part] = static_cast<char*>(output);
    args.part_bytes[part] = static_cast<uint32_t>(bytes);
  };
  if (quantizes) {
    add_part(0, outputs[0], call->q_columns);
    add_part(1, projection->q_a_scale, q_a_groups * sizeof(float));
  } else {
    add_part(0, outputs[0], (is_normed(*call) ? call->q_columns : call->columns) * item);
  }
  if (is_normed(*call)) {
    add_part(2, outputs[1], call->kv_columns * item);
    add_part(3, outputs[2], rest * item);
  }
  args.scale = projection->scale;
  args.scale_row_stride = projection->scale_row_stride;
  args.scale_group_stride = projection->scale_group_stride;
  args.weight_scale = projection->weight_scale;
  args.bias = projection->bias;
  args.norm_weights[0] = projection->q_a_weight;
  args.norm_weights[1] = projection->kv_a_weight;
  args.eps = projection->eps;
  args.weight_addend = weight_addend(projection->weight_offset);
  args.team = *team;
  args.call = with_norm(*call, projection->eps, projection->weight_offset);
  args.call.variant |= TPF_FUSED;
  args.fingerprint = fingerprint_of(args.call);
  args.partition = partition_of(call->num_tokens, team->world_size);
  args.row_blocks = plan.row_blocks;
  args.column_tiles = plan.column_tiles;
  args.k_blocks = plan.k_blocks;
  args.scale_quads = args.k_blocks % 4 == 0 && args.scale_group_stride == 1 && args.scale_row_stride % 4 == 0 &&
                     begins_at_16_bytes(args.scale) && begins_at_16_bytes(args.weight_scale);
  switch (call->dtype) {
    case TPF_BF16:
      return launch_planned<__nv_bfloat16>(TilesOf16Bits{}, args, plan, card, *projection, stream);
    case TPF_F16:
      return launch_planned<__half>(TilesOf16Bits{}, args, plan, card, *projection, stream);
    default:
      return launch_planned<__nv_fp8_e4m3>(TilesOfFp8{}, args, plan, card, *projection, stream);
  }
}
