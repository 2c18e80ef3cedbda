// Host side of every launch: the device, the grid, the launch itself.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>

#include "../protocol.h"

namespace tpf {

constexpr int64_t kStaticSharedBytes = 2048;  // what the kernels declare besides their dynamic part, at most

struct Device {
  int64_t shared_bytes;  // one block's, at most
  bool is_sm90;          // or newer: bulk copies, clusters, programmatic dependent launch
  bool is_hopper;        // sm_90 itself: its matrix instructions are not in later ones
  int processors;        // multiprocessors
};

struct Grid {
  int blocks, threads;
  size_t shared_bytes = 0;
  int cluster = 1;     // blocks of a cluster
  bool early = false;  // may come while the kernel before it still runs: it says wait_for_last_kernel
};

// Remembers the error for tpf_cuda_error_string.
tpf_status cuda_failed(cudaError_t error);

// Makes `ordinal` the current device, as the caller's tensors want, and tells what it can do.
tpf_status use_device(Device* device, int ordinal);

// A rank with more blocks has a card to itself. Half of H100's multiprocessors, whatever this card has: cards may
// differ, and all ranks have to choose alike.
constexpr int kHalfACard = 66;

struct Blocks {
  int grid;
  int rows;  // of one block, at most
};

inline int most_blocks(int max_ctas) { return std::min(max_ctas > 0 ? max_ctas : TPF_MAX_CTAS, TPF_MAX_CTAS); }

// At most `max_ctas` blocks, and no more than it takes for none of them to have more rows than another but one.
inline Blocks share_out(int64_t rows, int max_ctas) {
  const int64_t most = most_blocks(max_ctas);
  const int64_t each = (rows + most - 1) / most;
  return {static_cast<int>(each > 0 ? (rows + each - 1) / each : 1), static_cast<int>(each)};
}

// Whether a cluster of `size` blocks, one of a grid of `blocks`, finds room beside blocks that wait for it: it needs as
// many free multiprocessors of one GPC, and no card has more GPCs than kGpcs.
inline bool cluster_fits(const tpf_team& team, int size, int blocks) {
  constexpr int kGpcs = 8;
  return size == 1 || team.free_processors == 0 || team.free_processors - (blocks - size) > (size - 1) * kGpcs;
}

// Where this thread's launches are to be written down instead of made: while tpf_plan_cuda asks an op. Null elsewhere.
tpf_plan*& plan_instead();

template <typename Args>
tpf_status launch_kernel(void (*kernel)(Args), const Args& args, const Device& device, const Grid& grid,
                         tpf_stream stream) {
  if (tpf_plan* plan = plan_instead()) {
    *plan = {grid.blocks, grid.threads, grid.cluster, static_cast<int64_t>(grid.shared_bytes), args.call.source};
    return TPF_OK;
  }
  if (grid.shared_bytes + kStaticSharedBytes > 48 * 1024) {
    // More than a kernel has unasked. Once a kernel and process would do; asking each time costs less than a lock.
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(device.shared_bytes - kStaticSharedBytes));
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
  if (grid.early && device.is_sm90) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  return cuda_failed(cudaLaunchKernelEx(&config, kernel, args));
}

}  // namespace tpf
