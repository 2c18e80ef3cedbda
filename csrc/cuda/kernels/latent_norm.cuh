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

// The same of a part that there are no registers to hold, from memory twice: the same bits. The last vectors are the
// first to be stored, and none before it and kAtOnce others have been read.
template <typename T, int kAtOnce, typename Weight, typename Store>
__device__ inline void norm_part_twice(const T* row, int columns, float eps, Weight&& weight, Store&& store) {
  constexpr int kStride = 32 * kLanes<T>;
  const int lane = threadIdx.x % 32, vectors = (columns + kStride - 1) / kStride;
  const T* const own = row + lane * kLanes<T>;
  float squares = 0, values[kLanes<T>], scaled[kLanes<T>];
  uint4 raw[kAtOnce];
  const auto load = [&](int first) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const bool inside = first + i < vectors && lane * kLanes<T> < columns - (first + i) * kStride;
      raw[i] = inside ? load16(own + (first + i) * kStride) : uint4{};
    }
  };
#pragma unroll 1
  for (int first = 0; first < vectors; first += kAtOnce) {
    load(first);
#pragma unroll
    for (const uint4& vector : raw) {
      unpack(values, vector, T{});
#pragma unroll
      for (float value : values) squares = fmaf(value, value, squares);
    }
  }
  const float rstd = __frsqrt_rn(warp_sum(squares) / static_cast<float>(columns) + eps);
#pragma unroll 1
  for (int first = (vectors - 1) / kAtOnce * kAtOnce; first >= 0; first -= kAtOnce) {
    load(first);
#pragma unroll
    for (int i = kAtOnce - 1; i >= 0; --i) {
      if (first + i >= vectors || lane * kLanes<T> >= columns - (first + i) * kStride) continue;
      unpack(values, raw[i], T{});
      weight(scaled, first + i);
#pragma unroll
      for (int j = 0; j < kLanes<T>; ++j) scaled[j] *= values[j] * rstd;
      store(first + i, pack(scaled, T{}));
    }
  }
}

// A vector of bf16 to e4m3, by all lanes of a warp: 16 neighbours have the columns of a scale, which it returns. The
// formula is rs_rmsnorm_fp8's.
__device__ inline float quantize_vector(uint8_t* to, uint4 vector, bool rounded) {
  constexpr int kWidth = kLanes<__nv_bfloat16>;
  float values[kWidth], amax = 0;
  unpack(values, vector, __nv_bfloat16{});
#pragma unroll
  for (float value : values) amax = fmaxf(amax, fabsf(value));
  const Fp8Scale scale(warp_reduce(amax, Max{}, kQuantizedColumns / kWidth), rounded);
  store_e4m3(to, values, scale.inverse);
  return scale.scale;
}

}  // namespace tpf
