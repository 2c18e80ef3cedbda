// Which way rs_rmsnorm_ag_fp8 goes where no one kernel does all of it.
#pragma once
#include "card.h"

namespace tpf {

// Whether rs_rmsnorm_ag, planned as `gather`, brings all rows to every rank in 16 bits, and each quantises all of them;
// else owners quantise their rows, which a second kernel gathers. Of few rows a block, gathering twice the bytes takes
// less time than a kernel more that gathers. The one that quantises all rows takes bf16 and groups of 128.
inline bool quantized_by_all(const tpf_plan& gather, int32_t dtype, int64_t group_size, bool keep_output) {
  return !keep_output && group_size == kQuantizedColumns && dtype == TPF_BF16 && gather.body == TPF_ONE_ROW;
}

}  // namespace tpf
