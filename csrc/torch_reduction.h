// What the ops that reduce ask of a call.
#pragma once
#include <string_view>
#include <utility>

#include "torch_call.h"

namespace tpf {

struct ReduceCall : Call {
  // `residual` being a Tensor?.
  bool read(Value tensor, Value residual, Value group_name) {
    return Call::read(tensor, group_name, TPF_F32) && fits(input.rows, input.columns, input.dtype) &&
           input.columns <= TPF_MAX_HIDDEN_SIZE &&
           (!on_cuda() || (input.columns > 0 && input.columns % 8 == 0 && input.aligned())) &&
           read_residual(optional_tensor(residual));
  }
  // With a norm.
  bool read(Value tensor, Value residual, Value weight, Value eps, Value group_name, Value weight_offset) {
    return read(tensor, residual, group_name) && read_weight(handle<AtenTensorOpaque>(weight)) &&
           read_eps(eps, &this->eps) && read_weight_offset(weight_offset, &this->weight_offset);
  }
  Rows own_rows() const { return Call::own_rows(input.rows); }

  const void* residual = nullptr;
  const void* weight = nullptr;
  float eps = 0, weight_offset = 0;
  uint32_t variant = 0;

 private:
  bool read_residual(Tensor tensor) {
    if (tensor == nullptr) return true;
    View view;
    const Rows own = own_rows();
    if (!view.read(tensor) || view.dim != 2 || view.columns != input.columns || !view.like(input)) return false;
    if (view.rows != input.rows && view.rows != own.count) return false;
    if (on_cuda() && own.count > 0 && !view.aligned()) return false;
    residual = static_cast<char*>(view.data) + (view.rows == input.rows ? own.start * input.row_bytes() : 0);
    variant |= TPF_RESIDUAL;
    return true;
  }
  bool read_weight(Tensor tensor) {
    View view;
    if (!view.read(tensor) || view.columns != input.columns || !weighs(view, input.dtype)) return false;
    if (view.dtype != input.dtype) variant |= TPF_FLOAT_WEIGHT;
    weight = view.data;
    return true;
  }
};

// How normed rows are quantised.
struct Quantized {
  bool read(const ReduceCall& in, Value size, Value layout, Value keep) {
    group_size = static_cast<int64_t>(size);
    column = string(layout) == "column";
    keep_output = boolean(keep);
    if (!column && string(layout) != "row") return false;
    if (group_size < 1 || !std::in_range<int32_t>(group_size)) return false;
    return !in.on_cuda() || group_size == 64 || group_size == 128 || group_size >= in.input.columns;
  }
  int64_t group_size = 128;
  bool column = false, keep_output = false;
  bool gathered = false;  // by every rank: all rows
};

// rs_rmsnorm_ag.
bool reduce_and_gather(const ReduceCall& in, Results* results);
// rs_rmsnorm_fp8, and it with the quantised rows and their scales gathered.
bool reduce_fp8(const ReduceCall& in, const Quantized& as, Results* results);
bool reduce_and_gather_fp8(const ReduceCall& in, const Quantized& as, Value group_name, Results* results);

}  // namespace tpf
