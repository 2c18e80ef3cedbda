// Elements of any dtype as floats and back, one at a time: the slow and plain way, to compare the fast one with.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "tp_fused.h"

inline int64_t bytes_of(tpf_dtype dtype) {
  return dtype == TPF_F32 ? 4 : dtype == TPF_BF16 || dtype == TPF_F16 ? 2 : 1;
}

// A number of so many exponent and mantissa bits; `bias` below 0 exponents. All ones: infinity or NaN.
inline float decoded(uint32_t bits, int exponent_bits, int mantissa_bits) {
  const uint32_t largest = (1u << exponent_bits) - 1, exponent = bits >> mantissa_bits & largest;
  const uint32_t mantissa = bits & ((1u << mantissa_bits) - 1);
  const int bias = (1 << (exponent_bits - 1)) - 1;
  float value;
  if (exponent == largest) {
    value = mantissa == 0 ? std::numeric_limits<float>::infinity() : std::numeric_limits<float>::quiet_NaN();
  } else {
    const auto whole = static_cast<float>(exponent == 0 ? mantissa : mantissa | 1u << mantissa_bits);
    value = std::ldexp(whole, static_cast<int>(exponent == 0 ? 1 : exponent) - bias - mantissa_bits);
  }
  return (bits >> (exponent_bits + mantissa_bits) & 1) != 0 ? -value : value;
}

// e4m3 has no infinity: 0x7f alone is NaN.
inline float e4m3(uint8_t bits) {
  if ((bits & 0x78) == 0x78 && (bits & 7) != 7) {
    const float value = std::ldexp(static_cast<float>(8 + (bits & 7)), 5);
    return (bits & 0x80) != 0 ? -value : value;
  }
  return decoded(bits, 4, 3);
}

inline float load(const char* memory, int64_t element, tpf_dtype dtype) {
  uint32_t bits = 0;
  std::memcpy(&bits, memory + element * bytes_of(dtype), static_cast<size_t>(bytes_of(dtype)));
  return dtype == TPF_F32 ? std::bit_cast<float>(bits) : dtype == TPF_BF16 ? decoded(bits, 8, 7) : decoded(bits, 5, 10);
}

// To the nearest that the dtype has, to the even one of two.
inline float rounded(float value, tpf_dtype dtype) {
  if (dtype == TPF_F32 || !std::isfinite(value) || value == 0) return value;
  const bool bf16 = dtype == TPF_BF16;
  int exponent;
  std::frexp(value, &exponent);
  const int step = std::max(exponent - (bf16 ? 8 : 11), bf16 ? -133 : -24);
  const double nearest = std::ldexp(std::nearbyint(std::ldexp(double{value}, -step)), step);
  const double largest = bf16 ? std::ldexp(255.0, 120) : 65504;
  if (std::fabs(nearest) > largest) return std::copysign(std::numeric_limits<float>::infinity(), value);
  return static_cast<float>(nearest);
}

// Of a number that the dtype has.
inline void store(char* memory, int64_t element, float value, tpf_dtype dtype) {
  uint32_t bits = std::bit_cast<uint32_t>(value);
  if (dtype == TPF_BF16) bits >>= 16;
  if (dtype == TPF_F16) {
    const uint32_t sign = bits >> 16 & 0x8000;
    bits = value == 0 ? sign : sign | (((bits & 0x7fffffff) - (112u << 23)) >> 13);
  }
  std::memcpy(memory + element * bytes_of(dtype), &bits, static_cast<size_t>(bytes_of(dtype)));
}
