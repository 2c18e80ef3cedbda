#include <mutex>

#include "launch.cuh"

namespace tpf {
namespace {
thread_local cudaError_t last_error = cudaSuccess;

// What the card can do, and this build has code for: what was compiled for an older card may run on a newer one, but
// without what only that one has.
void ask(Device* device, int ordinal) {
  int shared = 0, major = 0, processors = 0;
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, ordinal);
  const bool is_sm90 = major == 9 ? TPF_CODE_FOR_90 != 0 : major > 9 && TPF_CODE_FOR_100;
  *device = {shared, is_sm90, major == 9 && TPF_CODE_FOR_90A, processors};
}

// Compiled for what all others are.
__global__ void any_kernel() {}
}  // namespace

tpf_status cuda_failed(cudaError_t error) {
  if (error == cudaSuccess) return TPF_OK;
  last_error = error;
  return TPF_CUDA_ERROR;
}

tpf_status use_device(Device* device, int ordinal) {
  int current = -1;
  if (const cudaError_t error = cudaGetDevice(&current); error != cudaSuccess) return cuda_failed(error);
  if (current != ordinal) {
    if (const cudaError_t error = cudaSetDevice(ordinal); error != cudaSuccess) return cuda_failed(error);
  }
  static Device known[64];
  static std::once_flag asked[64];
  const int entry = ordinal % 64;
  std::call_once(asked[entry], [&] { ask(&known[entry], ordinal); });
  *device = known[entry];
  return TPF_OK;
}

}  // namespace tpf

int32_t tpf_cuda_compiled(void) { return 1; }

int32_t tpf_cuda_has_code(int32_t device) {
  tpf::Device unused;
  cudaFuncAttributes attributes;
  const bool found =
      tpf::use_device(&unused, device) == TPF_OK && cudaFuncGetAttributes(&attributes, tpf::any_kernel) == cudaSuccess;
  cudaGetLastError();  // is not for whoever asks next
  return found;
}

const char* tpf_cuda_error_string(void) { return cudaGetErrorString(tpf::last_error); }

void tpf_team_close_cuda(const tpf_team* team) {
  const uint32_t closed = 1;
  cudaMemcpy(&tpf::control(team->region[team->rank])->closed, &closed, sizeof(closed), cudaMemcpyHostToDevice);
}

tpf_fault tpf_team_fault_cuda(const tpf_team* team, int32_t rank) {
  if (rank == team->rank) {
    const volatile tpf_fault* mail = team->mailbox;
    return mail->status != TPF_OK ? *team->mailbox : tpf_fault{};
  }
  tpf_fault fault = {};
  cudaMemcpy(&fault, &tpf::control(team->region[rank])->fault, sizeof(fault), cudaMemcpyDeviceToHost);
  return fault;
}
