// Host side of every launch: the device, and the launch itself. What is launched, csrc/plan has decided.
#pragma once
#include <cuda_runtime.h>

#include "../plan/card.h"

namespace tpf {

struct Grid {
  int blocks, threads;
  int64_t shared_bytes = 0;  // dynamic
  int cluster = 1;           // blocks of a cluster
  bool pdl = false;          // launched by PDL: may begin while the kernel before it still runs, and calls pdl_wait
};

// A function of libcuda, or null. It is not linked to: torch, or whoever calls, has loaded it.
void* driver_function(const char* name, unsigned version);

// Remembers the error for tpf_cuda_error_string.
tpf_status cuda_failed(cudaError_t error);

// Makes `ordinal`, where the caller's tensors are, the thread's current device for as long as this lives. Afterwards it
// is the one before, if the process uses that.
class OnDevice {
 public:
  explicit OnDevice(int ordinal);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  tpf_status status = TPF_OK;
  tpf_card card = {};  // what the device can do

 private:
  int before_ = -1;  // the device to return to, if another than `ordinal`
};

template <typename Args>
tpf_status launch_kernel(void (*kernel)(Args), const Args& args, const tpf_card& card, const Grid& grid,
                         tpf_stream stream) {
  if (grid.shared_bytes + kStaticSharedBytes > 48 * 1024) {
    // More than a kernel has unasked. Once a kernel and process would do; asking each time costs less than a lock.
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(card.shared_bytes - kStaticSharedBytes));
    if (error != cudaSuccess) return cuda_failed(error);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid.blocks);
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attributes[2] = {};
  config.attrs = attributes;
  if (grid.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
  }
  if (grid.pdl && has_tma(card)) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  return cuda_failed(cudaLaunchKernelEx(&config, kernel, args));
}

}  // namespace tpf
