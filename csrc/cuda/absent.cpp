// A build without nvcc: the CUDA ops are there and say so.
#include "../tp_fused.h"

int32_t tpf_cuda_compiled(void) { return 0; }
int32_t tpf_cuda_has_code(int32_t) { return 0; }
tpf_status tpf_card_of(tpf_card*, int32_t) { return TPF_UNSUPPORTED; }
const char* tpf_cuda_error_string(void) { return "this build has no CUDA kernels"; }

void tpf_team_close_cuda(const tpf_team*) {}
tpf_fault tpf_team_fault_cuda(const tpf_team*, int32_t) { return {}; }
tpf_status tpf_follow_stream_cuda(tpf_stream_order*, const tpf_team*, void*) { return TPF_UNSUPPORTED; }

tpf_status tpf_rs_rmsnorm_cuda(void*, void*, const void*, const tpf_symm*, const void*, const void*, const tpf_team*,
                               int64_t, int32_t, tpf_dtype, float, float, uint32_t, tpf_stream) {
  return TPF_UNSUPPORTED;
}

tpf_status tpf_rs_rmsnorm_fp8_cuda(void*, float*, void*, void*, const void*, const tpf_symm*, const void*, const void*,
                                   const tpf_team*, int64_t, int32_t, tpf_dtype, float, float, int32_t, int64_t,
                                   int64_t, uint32_t, tpf_stream) {
  return TPF_UNSUPPORTED;
}

tpf_status tpf_rs_rmsnorm_ag_cuda(void*, void*, const void*, const tpf_symm*, const void*, const void*, const tpf_team*,
                                  int64_t, int32_t, tpf_dtype, float, float, uint32_t, tpf_stream) {
  return TPF_UNSUPPORTED;
}

tpf_status tpf_reduce_scatter_rows_cuda(void*, const void*, const tpf_symm*, const void*, const tpf_team*, int64_t,
                                        int32_t, tpf_dtype, uint32_t, tpf_stream) {
  return TPF_UNSUPPORTED;
}

tpf_status tpf_all_gather_rows_cuda(void*, const void*, const tpf_team*, int64_t, int32_t, tpf_dtype, tpf_stream) {
  return TPF_UNSUPPORTED;
}

tpf_status tpf_gather_latent_cuda(void*, const void*, const tpf_team*, const tpf_call*, tpf_stream) {
  return TPF_UNSUPPORTED;
}

tpf_status tpf_gather_latent_norm_cuda(void*, void*, void*, const void*, const void*, const void*, const tpf_team*,
                                       const tpf_call*, int32_t, int32_t, float, float, tpf_stream) {
  return TPF_UNSUPPORTED;
}

tpf_status tpf_barrier_cuda(const tpf_team*, tpf_stream) { return TPF_UNSUPPORTED; }

tpf_status tpf_qkv_a_proj_ag_cuda(void* const[3], const tpf_projection*, const tpf_team*, const tpf_call*, tpf_stream) {
  return TPF_UNSUPPORTED;
}
