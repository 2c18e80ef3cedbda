// The row rule, host and device: torch.tensor_split's, and nothing else (tp_fused/partition.py says the same).
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define TPF_HD __host__ __device__
#else
#define TPF_HD
#endif

namespace tpf {

struct Rows {
  int64_t start, count;
};

TPF_HD inline Rows rows_of(int64_t num_tokens, int rank, int world_size) {
  const int64_t per = num_tokens / world_size, rem = num_tokens % world_size;
  return {rank * per + (rank < rem ? rank : rem), per + (rank < rem)};
}

}  // namespace tpf
