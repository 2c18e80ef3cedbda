// What rs_rmsnorm_kernel leaves of its outputs after a fault.
#pragma once
#include "rs_rmsnorm.cuh"

namespace tpf {

// Vectors [first, last) of what this rank's outputs have of row `row` of `owner`. kAllRows: it quantises the peers'
// rows, too.
template <typename T, Epilogue kEpilogue, bool kAllRows = false>
__device__ inline void poison_row(const RowView<T>& view, int owner, int64_t row, int first, int last, int thread,
                                  int threads) {
  const ReduceArgs& args = view.args;
  const int64_t at = row * view.hidden + first * kLanes<T>;  // of the owner's rows, in elements
  const int columns = (last - first) * kLanes<T>;
  const auto poison_columns = [&](void* rows, int64_t begin, int64_t element_bytes) {
    poison(static_cast<char*>(rows) + begin * element_bytes, columns * element_bytes, thread, threads);
  };
  if constexpr (kEpilogue == Epilogue::kGather) {
    poison_columns(args.output, view.rows(owner).start * view.hidden + at, sizeof(T));
  }
  if (kEpilogue == Epilogue::kFp8 && (kAllRows || owner == view.rank)) {
    const int64_t rows_before = kAllRows ? view.rows(owner).start : 0;
    poison_columns(args.q, rows_before * view.hidden + at, 1);
    const int group_size = min(static_cast<int>(args.call.group_size), view.hidden);
    const int end = (last * kLanes<T> + group_size - 1) / group_size;
    float* const scale = args.scale + (rows_before + row) * args.scale_row_stride;
    for (int group = first * kLanes<T> / group_size + thread; group < end; group += threads) {
      scale[group * args.scale_group_stride] = __uint_as_float(~0u);
    }
  }
  if (owner != view.rank) return;
  poison_columns(args.residual_out, at, sizeof(T));
  if (kEpilogue == Epilogue::kNorm || (args.call.variant & TPF_KEEP_OUTPUT) != 0) {
    poison_columns(args.output, at, sizeof(T));
  }
}

// A block that saw a fault leaves no number that could be taken for a result: rows b, b + blocks, ... of every rank
// whose rows it brings, and of these the vectors that it brings.
template <typename T, Epilogue kEpilogue>
__device__ inline void poison_rows(const RowView<T>& view, int b, int blocks, int first, int last) {
  __syncthreads();  // what other threads write of these rows is written
  for (int owner = 0; owner < view.world_size; ++owner) {
    if (kEpilogue != Epilogue::kGather && owner != view.rank) continue;
    for (int64_t row = b; row < view.rows(owner).count; row += blocks) {
      poison_row<T, kEpilogue>(view, owner, row, first, last, threadIdx.x, blockDim.x);
    }
  }
}

// Where rows are claimed, any of this rank's may be one that this block has added up, of inputs that a peer which gave
// up has overwritten meanwhile: all of them.
template <typename T, Epilogue kEpilogue>
__device__ inline void poison_rows(const RowView<T>& view, bool claimed = false) {
  poison_rows<T, kEpilogue>(view, claimed ? 0 : view.row_block(), claimed ? 1 : view.row_blocks(), 0,
                            view.hidden / kLanes<T>);
}

}  // namespace tpf
