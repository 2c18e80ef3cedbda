#include <algorithm>
#include <bit>
#include <optional>
#include <utility>

#include "plan/prologue.h"
#include "protocol.h"
#include "torch_call.h"
#include "torch_served.h"

namespace tpf {
namespace {

// A tensor that a kernel makes for itself.
class Temporary {
 public:
  Temporary() = default;
  Temporary(const Temporary&) = delete;
  Temporary& operator=(const Temporary&) = delete;
  ~Temporary() {
    if (tensor_ != nullptr) torch.aoti_torch_delete_tensor_object(tensor_);
  }
  Tensor get() const { return tensor_; }
  Tensor* out() { return &tensor_; }

 private:
  Tensor tensor_ = nullptr;
};

struct Projection : Call {
  bool read(Value rows, Value weight_value, Value count, Value group_name, Value whole, int largest_dtype) {
    weight_tensor = handle<AtenTensorOpaque>(weight_value);
    num_tokens = static_cast<int64_t>(count);
    complete = boolean(whole);
    if (!Call::read(rows, group_name, largest_dtype)) return false;
    if (!read_weight() || input.rows != (complete ? num_tokens : own_rows(num_tokens).count)) return false;
    return !on_cuda() || input.aligned();
  }
  // Of rows that are still to be made from `rows`, all num_tokens of them.
  bool read_ahead(Value rows, Value weight_value, Value group_name) {
    weight_tensor = handle<AtenTensorOpaque>(weight_value);
    if (!Call::read(rows, group_name, TPF_F32)) return false;
    num_tokens = input.rows;
    return read_weight();
  }
  // The weights of the latent norms.
  bool read_norms(Value q_a, Value kv_a) {
    if (!norms[0].read(handle<AtenTensorOpaque>(q_a)) || !norms[1].read(handle<AtenTensorOpaque>(kv_a))) return false;
    return weighs(norms[0]) && weighs(norms[1]) && norms[0].dtype == norms[1].dtype &&
           norms[0].columns + norms[1].columns <= weight.rows;
  }
  // [columns] of the rows' dtype; none is fine.
  bool read_bias(Tensor tensor) {
    bias_tensor = tensor;
    if (tensor == nullptr) return true;
    return bias.read(tensor) && bias.dim == 1 && bias.columns == weight.rows && bias.like(input) &&
           (!on_cuda() || bias.aligned());
  }
  int latent_dtype() const { return input.dtype == TPF_E4M3 ? TPF_BF16 : input.dtype; }
  tpf_call call(tpf_op op, int64_t q_columns = 0, int64_t kv_columns = 0) const {
    tpf_call call = projection_call(op, dtype(), num_tokens, input.columns, weight.rows, bias_tensor != nullptr,
                                    q_columns, kv_columns);
    if (complete) call.variant |= TPF_COMPLETE;
    return call;
  }
  tpf_projection operands() const {
    tpf_projection projection = {};
    projection.input = input.data;
    projection.weight = weight.data;
    projection.bias = bias.data;
    return projection;
  }

  // Product and gather in one kernel: whether it was launched, or nothing where that kernel does not serve.
  std::optional<bool> run_fused(void* const outputs[3], const tpf_projection& projection, const tpf_call& call) const {
    if (!on_cuda()) return std::nullopt;
    bool serves = true;
    const auto fused = [&](void* stream) {
      const tpf_status status = TPF_CUDA_OP(tpf_qkv_a_proj_ag_cuda)(outputs, &projection, team(), &call, stream);
      serves = status != TPF_UNSUPPORTED;
      return serves ? status : TPF_OK;
    };
    const bool launched = run(fused, [] { return TPF_OK; });
    return serves ? std::optional(launched) : std::nullopt;
  }

  // What this rank multiplies by: all rows of the weight or, where it has all tokens, its share.
  Rows weight_rows(const tpf_call& call) const {
    return complete ? latent_columns_of(call, team()->rank, team()->world_size) : Rows{0, weight.rows};
  }

  // Memory for this rank's part of the product, which begins at `data`; on the CPU in its slot of the next round.
  bool make_product(const Rows& columns, Temporary* product, void** data) const {
    if (workspace.team->fault_status() != TPF_OK) return false;
    const int64_t sizes[2] = {input.rows, columns.count}, strides[2] = {std::max<int64_t>(columns.count, 1), 1};
    const int32_t dtype = torch_dtypes[latent_dtype()], type = input.device_type, index = input.device_index;
    const int32_t made = on_cuda()
                             ? torch.aoti_torch_empty_strided(2, sizes, strides, dtype, type, index, product->out())
                             : torch.aoti_torch_create_tensor_from_blob(tpf_next_slot_cpu(team()), 2, sizes, strides, 0,
                                                                        dtype, type, index, product->out());
    return made == 0 && torch.aoti_torch_get_data_ptr(product->get(), data) == 0;
  }

  // torch's product.
  bool multiply(const tpf_call& call, Temporary* product, void** data) const {
    const Rows columns = weight_rows(call);
    const int64_t sizes[2] = {weight.columns, columns.count}, strides[2] = {1, std::max<int64_t>(weight.columns, 1)};
    Temporary transposed;
    if (!make_product(columns, product, data) ||
        !part_of(weight_tensor, 2, sizes, strides, columns.start * weight.columns, &transposed)) {
      return false;
    }
    if (bias_tensor == nullptr) {
      const auto mm = on_cuda() ? torch.aoti_torch_cuda_mm_out : torch.aoti_torch_cpu_mm_out;
      return mm(product->get(), input_tensor, transposed.get()) == 0;
    }
    const int64_t one = 1;
    Temporary own_bias;
    if (!part_of(bias_tensor, 1, &columns.count, &one, columns.start, &own_bias)) return false;
    const auto addmm = on_cuda() ? torch.aoti_torch_cuda_addmm_out : torch.aoti_torch_cpu_addmm_out;
    return addmm(product->get(), own_bias.get(), input_tensor, transposed.get(), 1, 1) == 0;
  }

  // `offset` elements behind the tensor's first one.
  static bool part_of(Tensor tensor, int64_t dim, const int64_t* sizes, const int64_t* strides, int64_t offset,
                      Temporary* part) {
    return torch.aoti_torch__reinterpret_tensor(tensor, dim, sizes, strides, offset, part->out()) == 0;
  }

  bool gather(void* latent, const void* rows, const tpf_call& call) const {
    return run([&](void* stream) { return TPF_CUDA_OP(tpf_gather_latent_cuda)(latent, rows, team(), &call, stream); },
               [&] { return tpf_qkv_a_proj_ag_cpu(latent, team(), &call); });
  }

  Tensor weight_tensor = nullptr, bias_tensor = nullptr;
  View weight, bias, norms[2];
  int64_t num_tokens = 0;
  bool complete = false;

 private:
  bool read_weight() {
    if (!weight.read(weight_tensor) || weight.dim != 2 || !weight.like(input)) return false;
    if (weight.columns != input.columns || !std::in_range<int32_t>(input.columns)) return false;
    if (!fits(num_tokens, weight.rows, latent_dtype())) return false;
    return !on_cuda() || (weight.rows > 0 && weight.aligned());
  }
};

// The scales of fp8 rows, row-major or column-major.
bool read_scale(const View& rows, Tensor tensor, View* scale) {
  if (!scale->read_strided(tensor) || scale->dim != 2 || scale->dtype != TPF_F32) return false;
  if (scale->device_type != rows.device_type || scale->device_index != rows.device_index) return false;
  return scale->rows == rows.rows && scale->columns == (rows.columns + 127) / 128 &&
         (scale->row_stride == 1 || scale->column_stride == 1 || scale->rows * scale->columns <= 1);
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
  Projection in;
  if (!in.read(arguments[0], arguments[2], arguments[4], arguments[5], arguments[6], TPF_E4M3)) return false;
  if (in.dtype() != TPF_E4M3) return false;
  if (in.on_cuda() && (in.weight.rows % 8 != 0 || in.weight.columns % 16 != 0)) return false;
  Tensor const scales[2] = {handle<AtenTensorOpaque>(arguments[1]), handle<AtenTensorOpaque>(arguments[3])};
  View scale, weight_scale;
  if (!read_scale(in.input, scales[0], &scale)) return false;
  if (!weight_scale.read(scales[1]) || weight_scale.dim != 2 || !weight_scale.like(scale) ||
      weight_scale.rows != (in.weight.rows + 127) / 128 || weight_scale.columns != scale.columns) {
    return false;
  }
  void* latent;
  if (!results->add(&latent, in.input, in.num_tokens, in.weight.rows, in.latent_dtype())) return false;
  const tpf_call call = in.call(TPF_QKV_A_PROJ_AG_FP8);
  tpf_projection projection = in.operands();
  projection.scale = static_cast<const float*>(scale.data);
  projection.scale_row_stride = scale.row_stride;
  projection.scale_group_stride = scale.column_stride;
  projection.weight_scale = static_cast<const float*>(weight_scale.data);
  void* const outputs[3] = {latent};
  if (const auto launched = in.run_fused(outputs, projection, call)) return *launched;
  Temporary product, own_weight, own_scale;
  void* rows;
  const Rows columns = in.weight_rows(call), blocks = {columns.start / 128, (columns.count + 127) / 128};
  const int64_t sizes[2] = {columns.count, in.weight.columns}, strides[2] = {std::max<int64_t>(sizes[1], 1), 1};
  const int64_t groups[2] = {blocks.count, scale.columns}, pitch[2] = {std::max<int64_t>(groups[1], 1), 1};
  return in.make_product(columns, &product, &rows) &&
         in.part_of(in.weight_tensor, 2, sizes, strides, columns.start * sizes[1], &own_weight) &&
         in.part_of(scales[1], 2, groups, pitch, blocks.start * groups[1], &own_scale) &&
         (columns.count == 0 || project_fp8(in.input_tensor, scales[0], own_weight.get(), own_scale.get(),
                                            product.get(), in.team()->max_ctas)) &&
         in.gather(latent, rows, call);
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
  if (!in.multiply(call, &product, &rows)) return false;
  const auto& p = projection;
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

}  // namespace tpf
