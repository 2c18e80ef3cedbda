// A build without nvcc: what asks for CUDA hears that it is not there. There are no CUDA ops (see TPF_CUDA_OP).
#include "../tp_fused.h"

int32_t tpf_cuda_compiled(void) { return 0; }
int32_t tpf_cuda_has_code(int32_t) { return 0; }
tpf_status tpf_card_of(tpf_card*, int32_t) { return TPF_UNSUPPORTED; }
const char* tpf_cuda_error_string(void) { return "this build has no CUDA kernels"; }

void tpf_team_close_cuda(const tpf_team*) {}
tpf_fault tpf_team_fault_cuda(const tpf_team*, int32_t) { return {}; }
tpf_status tpf_follow_stream_cuda(tpf_stream_order*, const tpf_team*, void*) { return TPF_UNSUPPORTED; }

tpf_status tpf_barrier_cuda(const tpf_team*, tpf_stream) { return TPF_UNSUPPORTED; }
