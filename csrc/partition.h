// Who owns which rows and columns, host and device: torch.tensor_split's rule. Of rows tp_fused/partition.py
// says the same.
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

// The rule after its division, which on a GPU costs more than a row.
struct Partition {
  TPF_HD Rows rows(int rank) const { return {rank * per + (rank < rem ? rank : rem), per + (rank < rem)}; }
  TPF_HD int64_t largest() const { return per + (rem > 0); }  // rows of the rank that owns most

  int64_t per;
  int32_t rem;
};

TPF_HD inline Partition partition_of(int64_t num_tokens, int world_size) {
  return {num_tokens / world_size, static_cast<int32_t>(num_tokens % world_size)};
}

TPF_HD inline Rows rows_of(int64_t num_tokens, int rank, int world_size) {
  return partition_of(num_tokens, world_size).rows(rank);
}

// Of columns that come in whole units, but for the last one.
TPF_HD inline Rows columns_of(int64_t columns, int64_t unit, int rank, int world_size) {
  const Rows units = rows_of((columns + unit - 1) / unit, rank, world_size);
  const int64_t start = units.start * unit < columns ? units.start * unit : columns;
  const int64_t end = (units.start + units.count) * unit;
  return {start, (end < columns ? end : columns) - start};
}

}  // namespace tpf
