// Ops as kernels of torch's dispatcher, those that another file calls: arguments as in the schemas of tp_fused/ops.py
// and projections.py; false where Python is to say why not.
#pragma once
#include "torch_values.h"

namespace tpf {

bool rs_rmsnorm(const Value* arguments, Results* results);
bool rs_rmsnorm_ag(const Value* arguments, Results* results);
bool rs_rmsnorm_fp8(const Value* arguments, Results* results);
bool rs_rmsnorm_ag_fp8(const Value* arguments, Results* results);
bool all_gather_rows(const Value* arguments, Results* results);
bool qkv_a_proj_ag(const Value* arguments, Results* results);
bool qkv_a_proj_ag_fp8(const Value* arguments, Results* results);
bool qkv_a_proj_ag_norm(const Value* arguments, Results* results);
bool qkv_a_proj_ag_norm_fp8(const Value* arguments, Results* results);
bool mla_prologue(const Value* arguments, Results* results);
bool mla_prologue_fp8(const Value* arguments, Results* results);

}  // namespace tpf
