// RMSNorm of one part of a latent row, by a warp that holds it in registers.
#pragma once
#include "../ptx/vec.cuh"

namespace tpf {

// Each lane's vectors. What lies outside is 0.
template <typename T, int kVectors>
struct NormedPart {
  static constexpr int kMaxColumns = kVectors * 32 * kLanes<T>;

  __device__ void load(const T* row, int columns) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int column = column_of(v);
      raw[v] = column < columns ? load16(row + column) : uint4{};
    }
  }

  // Of the row as stored, in fp32, rounded once. weight(values, v, column) fills in those of the lane's vector v;
  // store(column, vector) is called for all vectors that there are. Squares are added up in an order that depends on
  // the columns alone.
  template <typename Weight, typename Store>
  __device__ void norm(int columns, float eps, Weight&& weight, Store&& store) {
    float squares = 0, values[kLanes<T>], scaled[kLanes<T>];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      unpack(values, raw[v], T{});
#pragma unroll
      for (float value : values) squares = fmaf(value, value, squares);
    }
    // Unpacked again below: all values of the part would not find room in registers.
#pragma unroll
    for (uint4& word : raw) asm volatile("" : "+r"(word.x), "+r"(word.y), "+r"(word.z), "+r"(word.w));
    const float rstd = __frsqrt_rn(warp_sum(squares) / static_cast<float>(columns) + eps);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int column = column_of(v);
      if (column >= columns) break;
      unpack(values, raw[v], T{});
      weight(scaled, v, column);
#pragma unroll
      for (int i = 0; i < kLanes<T>; ++i) scaled[i] *= values[i] * rstd;
      store(column, pack(scaled, T{}));
    }
  }

  __device__ static int column_of(int v) { return (v * 32 + static_cast<int>(threadIdx.x % 32)) * kLanes<T>; }

  uint4 raw[kVectors];
};

}  // namespace tpf
