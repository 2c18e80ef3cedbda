#include "../plan/gather.h"
#include "gather.h"

tpf_status tpf_all_gather_rows_cpu(void* output, const void* input, const tpf_team* team, int64_t num_tokens,
                                   int32_t hidden_size, tpf_dtype dtype) {
  using namespace tpf;
  const tpf_call call = gather_call(dtype, num_tokens, hidden_size);
  Round round(*team, call);
  if (const tpf_status status = round.begin(); status != TPF_OK) return status;
  const int64_t row_bytes = hidden_size * bytes_of(dtype);
  const Rows own = round.rows(round.rank());
  if (own.count > 0) std::memcpy(round.slot(round.rank()), input, own.count * row_bytes);
  if (const tpf_status status = round.meet(0); status != TPF_OK) return status;
  gather_rows(round, static_cast<char*>(output), static_cast<const char*>(input), row_bytes);
  return round.end(false);
}

tpf_status tpf_gather_quantized_cpu(void* q, float* scale, const void* own_q, const float* own_scale,
                                    const tpf_team* team, int64_t num_tokens, int32_t hidden_size, int32_t group_size) {
  using namespace tpf;
  const tpf_call call = gather_call(TPF_E4M3, num_tokens, hidden_size, group_size);
  Round round(*team, call);
  if (const tpf_status status = round.begin(); status != TPF_OK) return status;
  const Rows own = round.rows(round.rank());
  const int64_t groups = (int64_t{hidden_size} + group_size - 1) / group_size, scale_bytes = groups * sizeof(float);
  const int64_t offset = staged_scales_offset(partition_of(num_tokens, round.world_size()).largest(), hidden_size);
  if (own.count > 0) {
    char* const slot = round.slot(round.rank());
    std::memcpy(slot, own_q, own.count * hidden_size);
    std::memcpy(slot + offset, own_scale, own.count * scale_bytes);
  }
  if (const tpf_status status = round.meet(0); status != TPF_OK) return status;
  gather_rows(round, static_cast<char*>(q), static_cast<const char*>(own_q), hidden_size);
  gather_rows(round, reinterpret_cast<char*>(scale), reinterpret_cast<const char*>(own_scale), scale_bytes, offset);
  return round.end(false);
}
