#include "all_gather_rows_launch.cuh"
#include "qkv_a_proj_ag_columns.cuh"
#include "qkv_a_proj_ag_columns.h"

namespace tpf {
namespace {

template <typename In>
tpf_status launch(const ColumnsArgs& args, const ColumnsPlan& plan, const tpf_card& card, tpf_stream stream) {
  const Grid grid = {plan.blocks, kColumnsThreads, plan.shared_bytes, plan.cluster, true};
  switch (plan.row_tiles) {
    case 1:
      return launch_kernel(qkv_a_proj_ag_columns_kernel<In, 1>, args, card, grid, stream);
    case 2:
      return launch_kernel(qkv_a_proj_ag_columns_kernel<In, 2>, args, card, grid, stream);
    case 4:
      if constexpr (sizeof(In) > 1) {
        return launch_kernel(qkv_a_proj_ag_columns_kernel<In, 4>, args, card, grid, stream);
      }
  }
  return TPF_UNSUPPORTED;
}

}  // namespace

tpf_status launch_columns(void* const outputs[3], const tpf_projection& projection, const tpf_team& team,
                          const tpf_call& call, const ColumnsPlan& plan, const tpf_card& card, tpf_stream stream) {
  ColumnsArgs args = {gather_args(nullptr, &team, with_norm(call, projection.eps, projection.weight_offset))};
  args.gather.call.variant |= TPF_FUSED;
  // Blocks meet those of their number, and cards of a group may lack unlike numbers of SMs for clusters (plan_columns):
  // ranks with unlike grids disagree.
  args.gather.fingerprint =
      mix(fingerprint_of(args.gather.call), static_cast<uint32_t>(plan.blocks << 8 | plan.cluster));
  args.gather.eps = projection.eps;
  args.gather.weight_addend = weight_addend(projection.weight_offset);
  args.gather.float_weights = (call.variant & TPF_FLOAT_WEIGHT) != 0;
  const int64_t bytes = bytes_of(latent_dtype(call));
  if (is_normed(call)) {
    add_part(args.gather, outputs[0], projection.q_a_weight, call.q_columns * bytes);
    add_part(args.gather, outputs[1], projection.kv_a_weight, call.kv_columns * bytes);
    add_part(args.gather, outputs[2], nullptr, (int64_t{call.columns} - call.q_columns - call.kv_columns) * bytes);
  } else {
    add_part(args.gather, outputs[0], nullptr, call.columns * bytes);
  }
  args.input = projection.input;
  args.weight = projection.weight;
  args.bias = projection.bias;
  args.scale = projection.scale;
  args.scale_row_stride = projection.scale_row_stride;
  args.scale_group_stride = projection.scale_group_stride;
  args.weight_scale = projection.weight_scale;
  args.q_a_scale = projection.q_a_scale;
  args.q_a_scale_row_stride = projection.q_a_scale_row_stride;
  args.q_a_scale_group_stride = projection.q_a_scale_group_stride;
  args.own = latent_columns_of(call, team.rank, team.world_size);
  args.units = plan.units;
  args.cluster = plan.cluster;
  args.row_blocks = plan.row_blocks;
  args.stages = plan.stages;
  args.stage_units = plan.stage_units;
  args.stage_vectors = plan.stage_vectors;
  args.ring_bytes = static_cast<int32_t>(plan.ring_bytes);
  switch (call.dtype) {
    case TPF_BF16:
      return launch<__nv_bfloat16>(args, plan, card, stream);
    case TPF_F16:
      return launch<__half>(args, plan, card, stream);
    case TPF_E4M3:
      return launch<__nv_fp8_e4m3>(args, plan, card, stream);
    default:
      return TPF_UNSUPPORTED;
  }
}

}  // namespace tpf
