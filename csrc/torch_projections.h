// The projections as kernels of torch's dispatcher: arguments as in the schemas of tp_fused/ops.py; false where Python
// is to say why not.
#pragma once
#include "torch_values.h"

namespace tpf {

bool qkv_a_proj_ag(const Value* arguments, Results* results);
bool qkv_a_proj_ag_fp8(const Value* arguments, Results* results);
bool qkv_a_proj_ag_norm(const Value* arguments, Results* results);

}  // namespace tpf
