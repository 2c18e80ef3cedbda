// RMSNorm of one part of a latent row, by a warp that holds it in registers, and its quantisation.
#pragma once
#include "../../protocol.h"
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

  // Of the row as stored, in fp32, rounded once. weight(values, v) fills in those of the lane's vector v, the one from
  // column_of(v) on; store(v, vector) is called for all vectors that there are. Squares are added up in an order that
  // depends on the columns alone.
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
      if (column_of(v) >= columns) break;
      unpack(values, raw[v], T{});
      weight(scaled, v);
#pragma unroll
      for (int i = 0; i < kLanes<T>; ++i) scaled[i] *= values[i] * rstd;
      store(v, pack(scaled, T{}));
    }
  }

  __device__ static int column_of(int v) { return (v * 32 + static_cast<int>(threadIdx.x % 32)) * kLanes<T>; }

  uint4 raw[kVectors];
};

// The largest magnitude of the columns that share a scale, of which 16 neighbouring lanes have a vector each. By all
// lanes of a warp.
__device__ inline float amax_of_group(uint4 vector) {
  constexpr int kWidth = kLanes<__nv_bfloat16>;
  float values[kWidth], amax = 0;
  unpack(values, vector, __nv_bfloat16{});
#pragma unroll
  for (float value : values) amax = fmaxf(amax, fabsf(value));
  return warp_reduce(amax, Max{}, kQuantizedColumns / kWidth);
}

// Such a vector to e4m3, by all lanes of a warp; returns the scale. The formula is rs_rmsnorm_fp8's.
__device__ inline float quantize_vector(uint8_t* to, uint4 vector, bool rounded) {
  float values[kLanes<__nv_bfloat16>];
  unpack(values, vector, __nv_bfloat16{});
  const Fp8Scale scale(amax_of_group(vector), rounded);
  store_e4m3(to, values, scale.inverse);
  return scale.scale;
}

}  // namespace tpf
