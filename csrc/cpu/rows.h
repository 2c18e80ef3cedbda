// Arithmetic on single rows: conversions, the sum in rank order, RMSNorm, fp8. Loops are written so that the compiler
// turns them into vector code; every conversion rounds to nearest even.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "../tp_fused.h"

namespace tpf {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

inline float to_float(float value) { return value; }

inline float to_float(Bf16 value) { return std::bit_cast<float>(uint32_t{value.bits} << 16); }

inline float to_float(F16 value) {
  const uint32_t magnitude = (value.bits & 0x7fffu) << 13;
  const uint32_t exponent = magnitude & 0x0f800000u;
  const uint32_t normal = magnitude + (112u << 23);
  const uint32_t special = normal + (112u << 23);  // infinity, NaN
  const float subnormal = std::bit_cast<float>(normal + (1u << 23)) - std::bit_cast<float>(113u << 23);
  const uint32_t bits = exponent == 0x0f800000u ? special : exponent == 0 ? std::bit_cast<uint32_t>(subnormal) : normal;
  return std::bit_cast<float>(bits | (value.bits & 0x8000u) << 16);
}

inline void store(float* out, float value) { *out = value; }

inline void store(Bf16* out, float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  out->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

inline void store(F16* out, float value) {
  const uint32_t all = std::bit_cast<uint32_t>(value);
  const uint32_t bits = all & 0x7fffffffu;
  const uint32_t special = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;
  // Adding 0.5 moves the last bit of a subnormal half to the last bit of the float: the addition rounds it.
  const float shifted = std::bit_cast<float>(bits) + 0.5f;
  const uint32_t subnormal = std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(0.5f);
  const uint32_t normal = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1)) >> 13;
  const uint32_t half = bits >= (143u << 23) ? special : bits < (113u << 23) ? subnormal : normal;
  out->bits = static_cast<uint16_t>(half | (all >> 16 & 0x8000u));
}

// e4m3 (no infinities, 448 the largest), saturating.
inline uint8_t to_e4m3(float value) {
  const uint32_t all = std::bit_cast<uint32_t>(value);
  const float magnitude = std::min(std::bit_cast<float>(all & 0x7fffffffu), 448.0f);
  const uint32_t bits = std::bit_cast<uint32_t>(magnitude);
  // 2^-9 is the step below 2^-6; adding 2^14 moves it to the last bit of the float.
  const uint32_t subnormal = std::bit_cast<uint32_t>(magnitude + 16384.0f) - std::bit_cast<uint32_t>(16384.0f);
  const uint32_t normal = (bits - (120u << 23) + 0x7ffffu + ((bits >> 20) & 1)) >> 20;
  const uint32_t eight = bits < (121u << 23) ? subnormal : normal;
  const bool nan = (all & 0x7fffffffu) > 0x7f800000u;
  return static_cast<uint8_t>((nan ? 0x7fu : eight) | (all >> 24 & 0x80u));
}

// The mean of squares is summed in double: it then does not depend on the order, whichever machine or backend adds it up.
class SquareSum {
 public:
  void add(const float* values, int count) {
    int i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const double value = values[i + lane];
        lanes_[lane] += value * value;
      }
    }
    for (; i < count; ++i) lanes_[0] += double{values[i]} * values[i];
  }
  // 1 / sqrt(mean + eps), in fp32.
  float rstd(int count, float eps) const {
    double sum = 0;
    for (const double lane : lanes_) sum += lane;
    return 1.0f / std::sqrt(static_cast<float>(sum / count) + eps);
  }

 private:
  static constexpr int kLanes = 16;
  double lanes_[kLanes] = {};
};

constexpr int kChunk = 1024;  // columns: sums of one chunk stay in the first cache

// stored = round(sources[0] + ... + sources[n-1] + residual), added in fp32 in this order. `values` gets the rounded
// sums back as fp32; `squares` may be null. `stored` may be null.
template <typename T>
void reduce_row(T* stored, float* values, SquareSum* squares, const T* const* sources, int num_sources,
                const T* residual, int hidden_size) {
  alignas(64) T rounded[kChunk];
  for (int begin = 0; begin < hidden_size; begin += kChunk) {
    const int count = std::min(kChunk, hidden_size - begin);
    float* sum = values + begin;
    const T* first = sources[0] + begin;
    for (int i = 0; i < count; ++i) sum[i] = to_float(first[i]);
    for (int s = 1; s < num_sources; ++s) {
      const T* source = sources[s] + begin;
      for (int i = 0; i < count; ++i) sum[i] += to_float(source[i]);
    }
    if (residual != nullptr) {
      const T* source = residual + begin;
      for (int i = 0; i < count; ++i) sum[i] += to_float(source[i]);
    }
    for (int i = 0; i < count; ++i) store(&rounded[i], sum[i]);
    std::copy_n(rounded, count, stored + begin);
    for (int i = 0; i < count; ++i) sum[i] = to_float(rounded[i]);
    if (squares != nullptr) squares->add(sum, count);
  }
}

template <typename T>
void scale_row(T* output, const float* values, const T* weight, float rstd, int count) {
  for (int i = 0; i < count; ++i) store(&output[i], values[i] * rstd * to_float(weight[i]));
}

// output = rms_norm(input) of a stored row.
template <typename T>
void norm_row(T* output, const T* input, const T* weight, int count, float eps) {
  SquareSum squares;
  float values[kChunk];
  for (int begin = 0; begin < count; begin += kChunk) {
    const int part = std::min(kChunk, count - begin);
    for (int i = 0; i < part; ++i) values[i] = to_float(input[begin + i]);
    squares.add(values, part);
  }
  const float rstd = squares.rstd(count, eps);
  for (int i = 0; i < count; ++i) store(&output[i], to_float(input[i]) * rstd * to_float(weight[i]));
}

// Calls `body.operator()<T>()` with the element type of `dtype`.
template <typename Body>
tpf_status visit(tpf_dtype dtype, Body&& body) {
  switch (dtype) {
    case TPF_BF16: return body.template operator()<Bf16>();
    case TPF_F16: return body.template operator()<F16>();
    case TPF_F32: return body.template operator()<float>();
    default: return TPF_UNSUPPORTED;
  }
}

inline int64_t bytes_of(tpf_dtype dtype) {
  return dtype == TPF_F32 ? 4 : dtype == TPF_BF16 || dtype == TPF_F16 ? 2 : 1;
}

}  // namespace tpf
