// qkv_a_proj_ag_columns_kernel, launched as planned.
#pragma once
#include "../../plan/columns.h"

namespace tpf {

tpf_status launch_columns(void* const outputs[3], const tpf_projection& projection, const tpf_team& team,
                          const tpf_call& call, const ColumnsPlan& plan, const tpf_card& card, tpf_stream stream);

}  // namespace tpf
