#include "all_gather_rows_launch.cuh"
#include "gather_columns.cuh"

namespace tpf {
namespace {

template <typename T>
tpf_status launch_columns(const GatherArgs& gather, const tpf_card& card, tpf_stream stream) {
  const Rows own = latent_columns_of(gather.call, gather.team.rank, gather.team.world_size);
  const int64_t item = bytes_of(latent_dtype(gather.call));
  GatherColumnsArgs args = {gather, own.start * item, own.count * item};
  const GatherPlan plan = plan_gather_columns(gather.call.num_tokens, limits_of(gather.team));
  args.gather.block_rows = plan.block_rows;
  const Grid grid = {plan.blocks, kGatherThreads, 0, 1, true};
  return launch_kernel(gather_columns_kernel<T>, args, card, grid, stream);
}

template <typename T>
tpf_status launch_gather(GatherArgs& args, tpf_stream stream) {
  const OnDevice on_device(args.team.device);
  if (on_device.status != TPF_OK) return on_device.status;
  const tpf_card& card = on_device.card;
  uintptr_t places = reinterpret_cast<uintptr_t>(args.input);
  for (const GatherPart& part : args.parts) {
    places |= reinterpret_cast<uintptr_t>(part.output) | reinterpret_cast<uintptr_t>(part.input) | part.row_bytes;
  }
  args.vectors = places % kVectorBytes == 0;
  if (args.call.variant & TPF_COMPLETE) return launch_columns<T>(args, card, stream);
  const GatherPlan plan = plan_gather(args.call.num_tokens, args.row_bytes, args.vectors, limits_of(args.team), card);
  args.block_rows = plan.block_rows;
  args.chunk_rows = plan.chunk_rows;
  args.num_chunks = plan.num_chunks;
  const Grid grid = {plan.blocks, kGatherThreads, plan.shared_bytes, 1, true};
  return launch_kernel(plan.bulk ? all_gather_rows_kernel<T, true> : all_gather_rows_kernel<T, false>, args, card, grid,
                       stream);
}

}  // namespace
}  // namespace tpf

tpf_status tpf_all_gather_rows_cuda(void* output, const void* input, const tpf_team* team, int64_t num_tokens,
                                    int32_t hidden_size, tpf_dtype dtype, tpf_stream stream) {
  tpf::GatherArgs args = tpf::gather_args(input, team, tpf::gather_call(dtype, num_tokens, hidden_size));
  tpf::add_part(args, output, nullptr, hidden_size * tpf::bytes_of(dtype), input);
  return tpf::launch_gather<void>(args, stream);
}

tpf_status tpf_gather_quantized_cuda(void* q, float* scale, const void* own_q, const float* own_scale,
                                     const tpf_team* team, int64_t num_tokens, int32_t hidden_size, int32_t group_size,
                                     tpf_stream stream) {
  const tpf_call call = tpf::gather_call(TPF_E4M3, num_tokens, hidden_size, group_size);
  const int64_t groups = (int64_t{hidden_size} + group_size - 1) / group_size;
  tpf::GatherArgs args = tpf::gather_args(own_q, team, call);
  tpf::add_part(args, q, nullptr, hidden_size, own_q);
  tpf::add_part(args, scale, nullptr, groups * sizeof(float), own_scale);
  return tpf::launch_gather<void>(args, stream);
}

tpf_status tpf_gather_latent_cuda(void* latent, const void* rows, const tpf_team* team, const tpf_call* call,
                                  tpf_stream stream) {
  tpf::GatherArgs args = tpf::gather_args(rows, team, *call);
  tpf::add_part(args, latent, nullptr, call->columns * tpf::bytes_of(tpf::latent_dtype(*call)), rows);
  return tpf::launch_gather<void>(args, stream);
}

tpf_status tpf_gather_latent_norm_cuda(void* q_a, void* kv_a, void* k_pe, const void* rows, const void* q_a_weight,
                                       const void* kv_a_weight, const tpf_team* team, const tpf_call* call,
                                       int32_t q_columns, int32_t kv_columns, float eps, float weight_offset,
                                       tpf_stream stream) {
  const int64_t bytes = tpf::bytes_of(tpf::latent_dtype(*call));
  tpf::GatherArgs args = tpf::gather_args(rows, team, tpf::with_norm(*call, eps, weight_offset));
  args.eps = eps;
  args.weight_addend = tpf::weight_addend(weight_offset);
  args.float_weights = (call->variant & TPF_FLOAT_WEIGHT) != 0;
  tpf::add_part(args, q_a, q_a_weight, q_columns * bytes);
  tpf::add_part(args, kv_a, kv_a_weight, kv_columns * bytes);
  tpf::add_part(args, k_pe, nullptr, (int64_t{call->columns} - q_columns - kv_columns) * bytes);
  switch (tpf::latent_dtype(*call)) {
    case TPF_BF16:
      return tpf::launch_gather<__nv_bfloat16>(args, stream);
    case TPF_F16:
      return tpf::launch_gather<__half>(args, stream);
    case TPF_F32:
      return tpf::launch_gather<float>(args, stream);
    default:
      return TPF_UNSUPPORTED;
  }
}
