// What the ops that project ask of a call, and how torch multiplies for them.
#pragma once
#include <algorithm>
#include <optional>
#include <utility>

#include "protocol.h"
#include "torch_call.h"

namespace tpf {

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
  // Of rows that are still to be made from `rows`, all num_tokens of them, in their dtype or in this one.
  bool read_ahead(Value rows, Value weight_value, Value group_name, std::optional<tpf_dtype> made_as = {}) {
    weight_tensor = handle<AtenTensorOpaque>(weight_value);
    if (!Call::read(rows, group_name, TPF_F32)) return false;
    num_tokens = input.rows;
    input.dtype = made_as.value_or(dtype());
    return read_weight();
  }
  // The weights of the latent norms.
  bool read_norms(Value q_a, Value kv_a) {
    if (!norms[0].read(handle<AtenTensorOpaque>(q_a)) || !norms[1].read(handle<AtenTensorOpaque>(kv_a))) return false;
    return weighs(norms[0], latent_dtype()) && weighs(norms[1], latent_dtype()) && norms[0].dtype == norms[1].dtype &&
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

}  // namespace tpf
