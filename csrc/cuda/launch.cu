#include <cuda.h>
#include <cudaTypedefs.h>

#include <chrono>
#include <mutex>
#include <thread>

#include "launch.cuh"

namespace tpf {
namespace {
thread_local cudaError_t last_error = cudaSuccess;

// Compiled for what all others are.
__global__ void any_kernel() {}

// As tpf_card's cluster_sms.
int sms_in_clusters(int shared, int architecture) {
  if (architecture < 90) return 0;
  constexpr int kCluster = 8;
  shared -= static_cast<int>(kStaticSharedBytes);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(kCluster);
  config.blockDim = dim3(32);
  config.dynamicSmemBytes = shared;  // so that an SM has one block
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {kCluster, 1, 1};
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  cudaFuncSetAttribute(any_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  cudaOccupancyMaxActiveClusters(&clusters, any_kernel, &config);
  cudaGetLastError();  // is not for whoever asks next
  return kCluster * clusters;
}

// What the card can do, and this build has code for: what was compiled for an older card may run on a newer one, but
// without what only that one has.
void ask(tpf_card* card, int ordinal) {
  int shared = 0, major = 0, sm_count = 0;
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal);
  cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, ordinal);
  const int built = major == 9 && TPF_CODE_FOR_90     ? 90
                    : major == 10 && TPF_CODE_FOR_100 ? 100
                    : major == 12 && TPF_CODE_FOR_120 ? 120
                                                      : 80;
  cudaFuncAttributes code = {};
  if (cudaFuncGetAttributes(&code, any_kernel) != cudaSuccess) cudaGetLastError();  // no code: tpf_cuda_has_code tells
  const int architecture = architecture_of(built, code.ptxVersion);
  *card = {architecture, sm_count, sms_in_clusters(shared, architecture), shared, major == 9 && TPF_CODE_FOR_90A};
}

// Whether this process uses the card already.
bool has_context(int ordinal) {
  static const auto state =
      reinterpret_cast<PFN_cuDevicePrimaryCtxGetState_v7000>(driver_function("cuDevicePrimaryCtxGetState", 7000));
  unsigned flags = 0;
  int active = 0;
  return state != nullptr && state(ordinal, &flags, &active) == CUDA_SUCCESS && active != 0;
}

// `next` waits for the work that `last` has been given.
tpf_status join(cudaStream_t last, cudaStream_t next) {
  cudaEvent_t event = nullptr;
  cudaError_t error = cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
  if (error == cudaSuccess) error = cudaEventRecord(event, last);
  if (error == cudaSuccess) error = cudaStreamWaitEvent(next, event, 0);
  if (event != nullptr) cudaEventDestroy(event);  // once it is over
  return cuda_failed(error);
}

// Beside kernels that run, and captures that are made: on a stream of its own.
bool read_control(Control* seen, const tpf_team& team, int rank) {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  cudaStream_t stream = nullptr;
  const bool read =
      cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess &&
      cudaMemcpyAsync(seen, team.region[rank], sizeof(*seen), cudaMemcpyDeviceToHost, stream) == cudaSuccess &&
      cudaStreamSynchronize(stream) == cudaSuccess;
  if (stream != nullptr) cudaStreamDestroy(stream);
  cudaThreadExchangeStreamCaptureMode(&mode);
  return read;
}
}  // namespace

void* driver_function(const char* name, unsigned version) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  cudaGetDriverEntryPointByVersion(name, &function, version, cudaEnableDefault, &result);
  return result == cudaDriverEntryPointSuccess ? function : nullptr;
}

tpf_status cuda_failed(cudaError_t error) {
  if (error == cudaSuccess) return TPF_OK;
  last_error = error;
  return TPF_CUDA_ERROR;
}

OnDevice::OnDevice(int ordinal) {
  int current = -1;
  if ((status = cuda_failed(cudaGetDevice(&current))) != TPF_OK) return;
  if (current != ordinal) {
    if ((status = cuda_failed(cudaSetDevice(ordinal))) != TPF_OK) return;
    before_ = current;
  }
  static tpf_card known[64];
  static std::once_flag asked[64];
  const int entry = ordinal % 64;
  std::call_once(asked[entry], [&] { ask(&known[entry], ordinal); });
  card = known[entry];
}

// Not to a card that the process does not use: cudaSetDevice would make a context there.
OnDevice::~OnDevice() {
  if (before_ < 0 || !has_context(before_)) return;
  if (cudaSetDevice(before_) != cudaSuccess) cudaGetLastError();  // is not for whoever asks next
}

}  // namespace tpf

int32_t tpf_cuda_compiled(void) { return 1; }

int32_t tpf_cuda_has_code(int32_t device) {
  const tpf::OnDevice on_device(device);
  cudaFuncAttributes attributes;
  const bool found = on_device.status == TPF_OK && cudaFuncGetAttributes(&attributes, tpf::any_kernel) == cudaSuccess;
  cudaGetLastError();  // is not for whoever asks next
  return found;
}

tpf_status tpf_card_of(tpf_card* card, int32_t device) {
  const tpf::OnDevice on_device(device);
  *card = on_device.card;
  return on_device.status;
}

const char* tpf_cuda_error_string(void) { return cudaGetErrorString(tpf::last_error); }

void tpf_team_close_cuda(const tpf_team* team) {
  const tpf::OnDevice on_device(team->device);
  const uint32_t closed = 1;
  cudaMemcpy(&tpf::control(team->region[team->rank])->closed, &closed, sizeof(closed), cudaMemcpyHostToDevice);
}

tpf_fault tpf_team_fault_cuda(const tpf_team* team, int32_t rank) {
  const volatile tpf_fault* mail = team->mailbox;
  if (rank == team->rank && mail->status != TPF_OK) return *team->mailbox;
  const tpf::OnDevice on_device(team->device);
  if (on_device.status != TPF_OK) return {};
  tpf::Control seen;
  if (!tpf::read_control(&seen, *team, rank)) return {};
  if (seen.faulted != 0) return seen.fault;
  if (rank != team->rank) return {};
  const tpf_fault fault = tpf::unrecorded_fault(seen, rank);
  if (fault.status != TPF_OVERLAP) return fault;
  // A kernel may be about to count its call: what is wrong stays so.
  const tpf::Progress before = seen.progress[0];
  std::this_thread::sleep_for(std::chrono::milliseconds(1));
  if (!tpf::read_control(&seen, *team, rank)) return {};
  const tpf::Progress& after = seen.progress[0];
  return after.calls == before.calls && after.begun == before.begun ? fault : tpf_fault{};
}

tpf_status tpf_follow_stream_cuda(tpf_stream_order* order, const tpf_team* team, void* stream) {
  const tpf::OnDevice on_device(team->device);
  if (on_device.status != TPF_OK) return on_device.status;
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  unsigned long long capture = 0;
  const auto next = static_cast<cudaStream_t>(stream);
  // An error says that another stream is captured and this, the legacy one, must not be asked: it is not captured.
  if (cudaStreamIsCapturing(next, &capturing) != cudaSuccess) cudaGetLastError(), capturing = {};
  if (capturing != cudaStreamCaptureStatusActive) {
    const bool follows = order->any == 0 || order->last == stream;
    const tpf_status status = follows ? TPF_OK : tpf::join(static_cast<cudaStream_t>(order->last), next);
    order->last = stream;
    order->any = 1;
    return status;
  }
  // What is captured runs later: it follows what the same capture has of this workspace.
  if (const cudaError_t error = cudaStreamGetCaptureInfo(next, &capturing, &capture); error != cudaSuccess) {
    return tpf::cuda_failed(error);
  }
  const bool follows = order->captured == 0 || order->capture != capture || order->last_captured == stream;
  const tpf_status status = follows ? TPF_OK : tpf::join(static_cast<cudaStream_t>(order->last_captured), next);
  order->last_captured = stream;
  order->capture = capture;
  order->captured = 1;
  return status;
}
