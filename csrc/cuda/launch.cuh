// Host side of every launch: the device, the grid, the launch itself.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>

#include "../protocol.h"

namespace tpf {

constexpr int64_t kStaticSharedBytes = 2048;  // what the kernels declare besides their dynamic part, at most

struct Device {
  int64_t shared_bytes;  // one block's, at most
  bool has_bulk_copies;
};

// Remembers the error for tpf_cuda_error_string.
tpf_status cuda_failed(cudaError_t error);

// Makes `ordinal` the current device, as the caller's tensors want, and tells what it can do.
tpf_status use_device(Device* device, int ordinal);

struct Blocks {
  int grid;
  int rows;  // of one block, at most
};

// At most `max_ctas` blocks, and no more than it takes for none of them to have more rows than another but one.
inline Blocks share_out(int64_t rows, int max_ctas) {
  const int64_t most = std::min<int64_t>(max_ctas > 0 ? max_ctas : TPF_MAX_CTAS, TPF_MAX_CTAS);
  const int64_t each = (rows + most - 1) / most;
  return {static_cast<int>(each > 0 ? (rows + each - 1) / each : 1), static_cast<int>(each)};
}

template <typename Args>
tpf_status launch_kernel(void (*kernel)(Args), const Args& args, const Device& device, int grid, int threads,
                         size_t shared_bytes, tpf_stream stream) {
  if (shared_bytes > 48 * 1024) {
    // Once a kernel and process would do; asking each time costs less than a lock.
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(device.shared_bytes - kStaticSharedBytes));
    if (error != cudaSuccess) return cuda_failed(error);
  }
  void* pointers[] = {const_cast<Args*>(&args)};
  return cuda_failed(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(grid), dim3(threads), pointers,
                                      shared_bytes, static_cast<cudaStream_t>(stream)));
}

}  // namespace tpf
