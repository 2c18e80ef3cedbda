// The ops that quantise normed rows to fp8: as torch_ops.cpp's.
#include "plan/gather.h"
#include "plan/quantized.h"
#include "protocol.h"
#include "torch_quantization.h"
#include "torch_reduction.h"
#include "torch_served.h"

namespace tpf {
namespace {

// Whether a kernel serves `op` of these rows on a card.
bool planned(tpf_plan* plan, const ReduceCall& in, tpf_op op, uint32_t variant) {
  if (!in.on_cuda()) return false;
  tpf_card card;
  const tpf_call call = reduce_call(op, in.dtype(), in.input.rows, in.input.columns, nullptr, in.variant | variant);
  return tpf_card_of(&card, in.team()->device) == TPF_OK && tpf_plan_call(plan, &call, in.team(), &card) == TPF_OK;
}

// Adds q and scale of so many rows to the results.
bool add_quantized(const ReduceCall& in, const Quantized& as, int64_t rows, tpf_quantization* to, Results* results) {
  const bool rounded = (in.variant & TPF_ROUND_SCALES) != 0;
  return add_quantized(in, rows, in.input.columns, as.group_size, as.column, rounded, to, results);
}

// rs_rmsnorm_ag, whose rows every rank then quantises.
bool gather_and_quantize(const ReduceCall& in, const Quantized& as, Results* results) {
  tpf_quantization to;
  Results normed;
  View rows;
  void* unused;
  if (!add_quantized(in, as, in.input.rows, &to, results) || !reduce_and_gather(in, &normed) || !rows.read(normed[0]) ||
      !quantize_rows(in, to, rows.data, rows.rows, rows.columns, in.dtype())) {
    return false;
  }
  results->take(normed.release_last());
  return results->add(&unused, in.input, 0, in.input.columns, in.dtype());
}

// Quantised rows and their scales, in one round or, where they do not go together, in two. `scales`: whose the gathered
// scales are to be.
bool gather_quantized(const ReduceCall& in, const Quantized& as, const Results& own, Value group_name, Results* results,
                      Results* scales) {
  const int64_t tokens = in.input.rows, columns = in.input.columns;
  const int64_t groups = (columns + as.group_size - 1) / as.group_size;
  if (!gathers_scales_too(tokens, columns, groups, in.team()->world_size, in.team()->slot_bytes)) {
    for (int i = 0; i < 2; ++i) {
      const Value rows[] = {reinterpret_cast<Value>(own[i]), static_cast<Value>(tokens), group_name};
      if (!all_gather_rows(rows, i == 0 ? results : scales)) return false;
    }
    return true;
  }
  View q, scale;
  void *all_q, *all_scales;
  if (!q.read(own[0]) || !scale.read(own[1]) || !results->add(&all_q, in.input, tokens, columns, TPF_E4M3) ||
      !scales->add(&all_scales, in.input, tokens, groups, TPF_F32)) {
    return false;
  }
  const auto launch = [&](auto* op, auto... last) {
    return op(all_q, static_cast<float*>(all_scales), q.data, static_cast<const float*>(scale.data), in.team(), tokens,
              columns, static_cast<int32_t>(as.group_size), last...);
  };
  return run(in, launch, TPF_CUDA_OP(tpf_gather_quantized_cuda), tpf_gather_quantized_cpu);
}

}  // namespace

bool reduce_fp8(const ReduceCall& in, const Quantized& as, Results* results) {
  const int64_t rows = in.own_rows().count, columns = in.input.columns;
  tpf_quantization to;
  void *residual_out, *output;
  if (!add_quantized(in, as, as.gathered ? in.input.rows : rows, &to, results)) return false;
  if (!results->add(&residual_out, in.input, rows, columns, in.dtype())) return false;
  if (!results->add(&output, in.input, as.keep_output ? rows : 0, columns, in.dtype())) return false;
  uint32_t variant = in.variant;
  // How a rank lays out scales that all ranks have concerns nobody else, in one synchronisation or two.
  if (as.column && !as.gathered) variant |= TPF_COLUMN_SCALES;
  if (as.gathered) variant |= TPF_GATHERED;
  if (as.keep_output) variant |= TPF_KEEP_OUTPUT;
  const Input symm(*in.workspace.team, in.input.data);
  const auto launch = [&](auto* op, auto... last) {
    return op(to.q, to.scale, residual_out, output, in.input.data, symm.get(), in.residual, in.weight, in.team(),
              in.input.rows, columns, in.dtype(), in.eps, in.weight_offset, to.group_size, to.scale_row_stride,
              to.scale_group_stride, variant, last...);
  };
  return run(in, launch, TPF_CUDA_OP(tpf_rs_rmsnorm_fp8_cuda), tpf_rs_rmsnorm_fp8_cpu);
}

bool reduce_and_gather_fp8(const ReduceCall& in, const Quantized& as, Value group_name, Results* results) {
  // Before anything is launched: of narrow groups a row has more bytes of scales than of elements.
  if (!in.fits(in.input.rows, (in.input.columns + as.group_size - 1) / as.group_size, TPF_F32)) return false;
  tpf_plan plan;
  if (planned(&plan, in, TPF_RS_RMSNORM_FP8, TPF_GATHERED)) {
    return reduce_fp8(in, {as.group_size, as.column, as.keep_output, true}, results);
  }
  if (planned(&plan, in, TPF_RS_RMSNORM_AG, 0) && quantized_by_all(plan, in.dtype(), as.group_size, as.keep_output)) {
    return gather_and_quantize(in, as, results);
  }
  Results own, scales;
  if (!reduce_fp8(in, {as.group_size, false, as.keep_output}, &own)) return false;
  if (!gather_quantized(in, as, own, group_name, results, as.column ? &scales : results)) return false;
  if (as.column) {
    View scale;
    void* unused;
    if (!scale.read(scales[0])) return false;
    if (!results->add_column_major(&unused, in.input, scale.rows, scale.columns, (scale.rows + 3) / 4 * 4) ||
        torch.aoti_torch_copy_((*results)[1], scales[0], 0) != 0) {
      return false;
    }
  }
  const Tensor output = own.release_last();
  results->take(own.release_last());
  results->take(output);
  return true;
}

bool rs_rmsnorm_fp8(const Value* arguments, Results* results) {
  ReduceCall in;
  Quantized as;
  if (!in.read(arguments[0], arguments[1], arguments[2], arguments[3], arguments[4], arguments[9])) return false;
  if (!as.read(in, arguments[5], arguments[6], arguments[7])) return false;
  if (boolean(arguments[8])) in.variant |= TPF_COMPLETE;
  if (boolean(arguments[10])) in.variant |= TPF_ROUND_SCALES;
  return reduce_fp8(in, as, results);
}

bool rs_rmsnorm_ag_fp8(const Value* arguments, Results* results) {
  ReduceCall in;
  Quantized as;
  if (!in.read(arguments[0], arguments[1], arguments[2], arguments[3], arguments[4], arguments[8])) return false;
  if (!as.read(in, arguments[5], arguments[6], arguments[7])) return false;
  if (boolean(arguments[9])) in.variant |= TPF_ROUND_SCALES;
  return reduce_and_gather_fp8(in, as, arguments[4], results);
}

}  // namespace tpf
