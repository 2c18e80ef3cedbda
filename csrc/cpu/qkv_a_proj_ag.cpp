// The projection itself is the caller's (torch's own matrix product writes into the slot); here rows travel or, of rows
// that every rank has, columns.
#include "gather.h"
#include "rows.h"

tpf_status tpf_qkv_a_proj_ag_cpu(void* latent, const tpf_team* team, const tpf_call* call) {
  using namespace tpf;
  Round round(*team, *call);
  if (const tpf_status status = round.begin(); status != TPF_OK) return status;
  if (const tpf_status status = round.meet(0); status != TPF_OK) return status;
  const int64_t row_bytes = call->columns * bytes_of(latent_dtype(*call));
  if (call->variant & TPF_COMPLETE) {
    gather_columns(round, *call, [&](int64_t token, const char* row) {
      if (row_bytes > 0) std::memcpy(static_cast<char*>(latent) + token * row_bytes, row, row_bytes);
    });
  } else {
    gather_rows(round, static_cast<char*>(latent), round.slot(round.rank()), row_bytes);
  }
  return round.end(false);
}

tpf_status tpf_qkv_a_proj_ag_norm_cpu(void* q_a, void* kv_a, void* k_pe, const void* q_a_weight,
                                      const void* kv_a_weight, const tpf_team* team, const tpf_call* call,
                                      int32_t q_columns, int32_t kv_columns, float eps, float weight_offset) {
  using namespace tpf;
  const tpf_call announced = with_norm(*call, eps, weight_offset);
  Round round(*team, announced);
  if (const tpf_status status = round.begin(); status != TPF_OK) return status;
  if (const tpf_status status = round.meet(0); status != TPF_OK) return status;
  return visit(latent_dtype(*call), [&]<typename T>() {
    const Norm norm(eps, weight_offset, call->variant);
    const int64_t pe_columns = int64_t{call->columns} - q_columns - kv_columns;
    const auto finish = [&](int64_t token, const void* latent) {
      const T* const row = static_cast<const T*>(latent);
      norm_row(static_cast<T*>(q_a) + token * q_columns, row, q_a_weight, q_columns, norm);
      norm_row(static_cast<T*>(kv_a) + token * kv_columns, row + q_columns, kv_a_weight, kv_columns, norm);
      std::copy_n(row + q_columns + kv_columns, pe_columns, static_cast<T*>(k_pe) + token * pe_columns);
    };
    if (call->variant & TPF_COMPLETE) {
      gather_columns(round, *call, finish);
      return round.end(false);
    }
    for (int peer = 0; peer < round.world_size(); ++peer) {
      const Rows rows = round.rows(peer);
      const T* row = reinterpret_cast<const T*>(round.slot(peer));
      for (int64_t token = rows.start; token < rows.start + rows.count; ++token, row += call->columns) {
        finish(token, row);
      }
    }
    return round.end(false);
  });
}
