#include <algorithm>
#include <bit>

#include "plan/projection.h"
#include "plan/prologue.h"
#include "torch_projection.h"
#include "torch_quantization.h"
#include "torch_reduction.h"
#include "torch_served.h"

namespace tpf {
namespace {

// Of fp8 rows by an fp8 weight, both with scales.
struct ProjectionFp8 : Projection {
  bool read(Value rows, Value scale_value, Value weight_value, Value weight_scale_value, Value count, Value group_name,
            Value whole) {
    scales[0] = handle<AtenTensorOpaque>(scale_value), scales[1] = handle<AtenTensorOpaque>(weight_scale_value);
    if (!Projection::read(rows, weight_value, count, group_name, whole, TPF_E4M3) || dtype() != TPF_E4M3) return false;
    return read_scale() && read_weight_scale();
  }
  // Of rows that are still to be made from `rows`, in fp8.
  bool read_ahead(Value rows, Value weight_value, Value weight_scale_value, Value group_name) {
    scales[1] = handle<AtenTensorOpaque>(weight_scale_value);
    return Projection::read_ahead(rows, weight_value, group_name, TPF_E4M3) && read_weight_scale();
  }
  tpf_projection operands() const {
    tpf_projection projection = Projection::operands();
    projection.scale = static_cast<const float*>(scale.data);
    projection.scale_row_stride = scale.row_stride;
    projection.scale_group_stride = scale.column_stride;
    projection.weight_scale = static_cast<const float*>(weight_scale.data);
    return projection;
  }
  // The product, by Triton or in plain torch.
  bool multiply(const tpf_call& call, Temporary* product, void** data) const {
    Temporary own_weight, own_scale;
    const Rows columns = weight_rows(call), blocks = {columns.start / 128, (columns.count + 127) / 128};
    const int64_t sizes[2] = {columns.count, weight.columns}, strides[2] = {std::max<int64_t>(sizes[1], 1), 1};
    const int64_t groups[2] = {blocks.count, scale.columns}, pitch[2] = {std::max<int64_t>(groups[1], 1), 1};
    return make_product(columns, product, data) &&
           part_of(weight_tensor, 2, sizes, strides, columns.start * sizes[1], &own_weight) &&
           part_of(scales[1], 2, groups, pitch, blocks.start * groups[1], &own_scale) &&
           (columns.count == 0 ||
            project_fp8(input_tensor, scales[0], own_weight.get(), own_scale.get(), product->get(), team()->max_ctas));
  }

  Tensor scales[2] = {};
  View scale, weight_scale;

 private:
  bool read_weight_scale() {
    if (on_cuda() && (weight.rows % 8 != 0 || weight.columns % 16 != 0)) return false;
    if (!weight_scale.read(scales[1]) || weight_scale.dim != 2 || weight_scale.dtype != TPF_F32) return false;
    if (weight_scale.device_type != input.device_type || weight_scale.device_index != input.device_index) return false;
    return weight_scale.rows == (weight.rows + 127) / 128 && weight_scale.columns == (input.columns + 127) / 128;
  }
  // One for each row and 128 columns, row-major or column-major.
  bool read_scale() {
    if (!scale.read_strided(scales[0]) || scale.dim != 2 || scale.dtype != TPF_F32) return false;
    if (scale.device_type != input.device_type || scale.device_index != input.device_index) return false;
    return scale.rows == input.rows && scale.columns == (input.columns + 127) / 128 &&
           (scale.row_stride == 1 || scale.column_stride == 1 || scale.rows * scale.columns <= 1);
  }
};

// Gathers a product, normed and split; q_a, kv_a and k_pe are the outputs.
bool gather_normed(const Projection& in, void* const outputs[3], const void* rows, const tpf_call& call,
                   const tpf_projection& p) {
  return in.run(
      [&](void* stream) {
        return TPF_CUDA_OP(tpf_gather_latent_norm_cuda)(outputs[0], outputs[1], outputs[2], rows, p.q_a_weight,
                                                        p.kv_a_weight, in.team(), &call, p.q_columns, p.kv_columns,
                                                        p.eps, p.weight_offset, stream);
      },
      [&] {
        return tpf_qkv_a_proj_ag_norm_cpu(outputs[0], outputs[1], outputs[2], p.q_a_weight, p.kv_a_weight, in.team(),
                                          &call, p.q_columns, p.kv_columns, p.eps, p.weight_offset);
      });
}

// The projection with q_a quantised on the way, in one kernel: whether it was launched, or nothing where no kernel
// serves. Scales that are gathered are row-major: to another layout they are copied.
std::optional<bool> run_quantized(const ProjectionFp8& in, void* const outputs[3], tpf_projection projection,
                                  const tpf_call& call, const tpf_quantization& to, Tensor scale) {
  if (!in.on_cuda()) return std::nullopt;
  void* const quantized[3] = {to.q, outputs[1], outputs[2]};
  const bool copied = !in.complete && to.scale_group_stride != 1;
  Results row_major;
  tpf_quantization gathered = to;
  if (copied && !add_scale(in, in.num_tokens, call.q_columns, kQuantizedColumns, false, &gathered, &row_major)) {
    return false;
  }
  projection.q_a_scale = gathered.scale;
  projection.q_a_scale_row_stride = gathered.scale_row_stride;
  projection.q_a_scale_group_stride = gathered.scale_group_stride;
  const auto launched = in.run_fused(quantized, projection, call);
  if (!copied || !launched || !*launched) return launched;
  return torch.aoti_torch_copy_(scale, row_major[0], 0) == 0;
}

}  // namespace

bool qkv_a_proj_ag(const Value* arguments, Results* results) {
  Projection in;
  if (!in.read(arguments[0], arguments[1], arguments[2], arguments[3], arguments[5], TPF_F32)) return false;
  if (!in.read_bias(optional_tensor(arguments[4]))) return false;
  void* latent;
  if (!results->add(&latent, in.input, in.num_tokens, in.weight.rows, in.dtype())) return false;
  const tpf_call call = in.call(TPF_QKV_A_PROJ_AG);
  void* const outputs[3] = {latent};
  if (const auto launched = in.run_fused(outputs, in.operands(), call)) return *launched;
  Temporary product;
  void* rows;
  return in.multiply(call, &product, &rows) && in.gather(latent, rows, call);
}

bool qkv_a_proj_ag_fp8(const Value* arguments, Results* results) {
  ProjectionFp8 in;
  const Value* a = arguments;
  if (!in.read(a[0], a[1], a[2], a[3], a[4], a[5], a[6])) return false;
  void* latent;
  if (!results->add(&latent, in.input, in.num_tokens, in.weight.rows, in.latent_dtype())) return false;
  const tpf_call call = in.call(TPF_QKV_A_PROJ_AG_FP8);
  void* const outputs[3] = {latent};
  if (const auto launched = in.run_fused(outputs, in.operands(), call)) return *launched;
  Temporary product;
  void* rows;
  return in.multiply(call, &product, &rows) && in.gather(latent, rows, call);
}

bool qkv_a_proj_ag_norm(const Value* arguments, Results* results) {
  Projection in;
  if (!in.read(arguments[0], arguments[1], arguments[5], arguments[6], arguments[8], TPF_F32)) return false;
  float eps = 0, weight_offset = 0;
  if (!in.read_norms(arguments[2], arguments[3])) return false;
  const auto& norms = in.norms;
  const int64_t columns[3] = {norms[0].columns, norms[1].columns, in.weight.rows - norms[0].columns - norms[1].columns};
  if (!read_eps(arguments[4], &eps) || !read_weight_offset(arguments[7], &weight_offset)) return false;
  void* outputs[3];
  for (int i = 0; i < 3; ++i) {
    if (!results->add(&outputs[i], in.input, in.num_tokens, columns[i], in.dtype())) return false;
  }
  tpf_call call = in.call(TPF_QKV_A_PROJ_AG_NORM, columns[0], columns[1]);
  if (norms[0].dtype != in.input.dtype) call.variant |= TPF_FLOAT_WEIGHT;
  tpf_projection projection = in.operands();
  projection.q_a_weight = norms[0].data;
  projection.kv_a_weight = norms[1].data;
  projection.q_columns = static_cast<int32_t>(columns[0]);
  projection.kv_columns = static_cast<int32_t>(columns[1]);
  projection.eps = eps;
  projection.weight_offset = weight_offset;
  if (const auto launched = in.run_fused(outputs, projection, call)) return *launched;
  Temporary product;
  void* rows;
  return in.multiply(call, &product, &rows) && gather_normed(in, outputs, rows, call, projection);
}

// q_a leaves in 16 bits or, quantised, as e4m3 with scales; where no kernel does that on the way, its 16 bits are a
// tensor of this call's own.
bool qkv_a_proj_ag_norm_fp8(const Value* arguments, Results* results) {
  ProjectionFp8 in;
  const Value* a = arguments;
  if (!in.read(a[0], a[1], a[2], a[3], a[7], a[8], a[11]) || !in.read_norms(a[4], a[5])) return false;
  float eps = 0;
  const bool quantize = boolean(a[9]), rounded = boolean(a[12]);
  const std::string_view layout = string(a[10]);
  const bool column = layout == "column";
  if (!read_eps(a[6], &eps) || (!column && layout != "row")) return false;
  const int64_t columns[3] = {in.norms[0].columns, in.norms[1].columns,
                              in.weight.rows - in.norms[0].columns - in.norms[1].columns};
  const int64_t tokens = in.num_tokens;
  const int dtype = in.latent_dtype();
  void* outputs[3] = {};
  tpf_quantization to = {};
  if (!(quantize ? add_quantized(in, tokens, columns[0], kQuantizedColumns, column, rounded, &to, results)
                 : results->add(&outputs[0], in.input, tokens, columns[0], dtype) &&
                       add_scale(in, 0, columns[0], kQuantizedColumns, column, &to, results))) {
    return false;
  }
  for (int i = 1; i < 3; ++i) {
    if (!results->add(&outputs[i], in.input, tokens, columns[i], dtype)) return false;
  }
  tpf_call call = in.call(TPF_QKV_A_PROJ_AG_NORM_FP8, columns[0], columns[1]);
  if (in.norms[0].dtype != dtype) call.variant |= TPF_FLOAT_WEIGHT;
  if (quantize) call.group_size = kQuantizedColumns;
  if (quantize && rounded) call.variant |= TPF_ROUND_SCALES;
  tpf_projection projection = in.operands();
  projection.q_a_weight = in.norms[0].data;
  projection.kv_a_weight = in.norms[1].data;
  projection.q_columns = static_cast<int32_t>(columns[0]);
  projection.kv_columns = static_cast<int32_t>(columns[1]);
  projection.eps = eps;
  std::optional<bool> launched;
  if (quantizes_q_a(call)) launched = run_quantized(in, outputs, projection, call, to, (*results)[1]);
  if (launched) return *launched;
  Results own;
  if (quantize && !own.add(&outputs[0], in.input, tokens, columns[0], dtype)) return false;
  if (!quantizes_q_a(call)) launched = in.run_fused(outputs, projection, call);
  Temporary product;
  void* rows;
  if (launched ? !*launched
               : !in.multiply(call, &product, &rows) || !gather_normed(in, outputs, rows, call, projection)) {
    return false;
  }
  return !quantize || quantize_rows(in, to, outputs[0], tokens, columns[0], dtype);
}

// Two ops, one after the other. What the second one would refuse is known before the first is launched.
bool mla_prologue(const Value* arguments, Results* results) {
  const Value input = arguments[0], residual = arguments[1], norm_weight = arguments[2], weight = arguments[3];
  const Value q_a_weight = arguments[4], kv_a_weight = arguments[5], eps = arguments[6], group_name = arguments[7];
  const Value complete = arguments[8], no_offset = std::bit_cast<Value>(0.0);
  Projection ahead;
  if (!ahead.read_ahead(input, weight, group_name) || !ahead.read_norms(q_a_weight, kv_a_weight)) return false;
  const int64_t num_tokens = ahead.num_tokens;
  const bool gathers =
      !boolean(complete) && gathers_normed_rows(num_tokens, ahead.weight.rows, ahead.team()->world_size);
  const Value for_all[] = {input, residual, norm_weight, eps, group_name, no_offset};
  const Value for_owner[] = {input, residual, norm_weight, eps, group_name, complete, no_offset};
  Results normed;
  if (!(gathers ? rs_rmsnorm_ag(for_all, &normed) : rs_rmsnorm(for_owner, &normed))) return false;
  const Value rows = reinterpret_cast<Value>(normed[0]), count = static_cast<Value>(num_tokens);
  const Value projected[] = {rows, weight, q_a_weight, kv_a_weight, eps, count, group_name, no_offset, Value{gathers}};
  if (!qkv_a_proj_ag_norm(projected, results)) return false;
  results->take(normed.release_last());
  return true;
}

// As mla_prologue; the scales of the normed rows are row-major, those of q_a as they are asked for.
bool mla_prologue_fp8(const Value* a, Results* results) {
  const Value input = a[0], residual = a[1], norm_weight = a[2], weight = a[3], weight_scale = a[4], q_a_weight = a[5];
  const Value kv_a_weight = a[6], eps = a[7], group_name = a[8], quantize_q_a = a[9], layout = a[10], rounded = a[11];
  const Value complete = a[12];
  ReduceCall in;
  ProjectionFp8 ahead;
  if (!in.read(input, residual, norm_weight, eps, group_name, std::bit_cast<Value>(0.0)) ||
      !ahead.read_ahead(input, weight, weight_scale, group_name) || !ahead.read_norms(q_a_weight, kv_a_weight) ||
      (string(layout) != "row" && string(layout) != "column")) {
    return false;
  }
  const bool gathers =
      !boolean(complete) && gathers_normed_rows(in.input.rows, ahead.weight.rows, in.team()->world_size);
  if (boolean(complete)) in.variant |= TPF_COMPLETE;
  if (boolean(rounded)) in.variant |= TPF_ROUND_SCALES;
  Results normed;
  if (!(gathers ? reduce_and_gather_fp8(in, {}, group_name, &normed) : reduce_fp8(in, {}, &normed))) return false;
  const auto count = static_cast<Value>(in.input.rows);
  const Value projected[] = {reinterpret_cast<Value>(normed[0]),
                             reinterpret_cast<Value>(normed[1]),
                             weight,
                             weight_scale,
                             q_a_weight,
                             kv_a_weight,
                             eps,
                             count,
                             group_name,
                             quantize_q_a,
                             layout,
                             Value{gathers},
                             rounded};
  if (!qkv_a_proj_ag_norm_fp8(projected, results)) return false;
  normed.drop_last();  // the normed rows in 16 bits, of which there are none
  results->take(normed.release_last());
  return true;
}

}  // namespace tpf
