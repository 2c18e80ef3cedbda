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
