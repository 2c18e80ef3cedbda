// Arithmetic on single rows: conversions, the sum in rank order, RMSNorm, fp8. Everything works on 8 columns at a time,
// in the vector extensions of GCC and Clang; every conversion rounds to nearest even.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../protocol.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace tpf {

constexpr int kLanes = 8;
using Floats = float __attribute__((vector_size(kLanes * 4)));
using HalfFloats = float __attribute__((vector_size(kLanes * 2)));
using HalfDoubles = double __attribute__((vector_size(kLanes * 4)));
using Ints = int32_t __attribute__((vector_size(kLanes * 4)));
using Halves = uint16_t __attribute__((vector_size(kLanes * 2)));
using Bytes = uint8_t __attribute__((vector_size(kLanes)));

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

inline Ints bits_of(Floats values) { return std::bit_cast<Ints>(values); }
inline Floats floats_of(Ints bits) { return std::bit_cast<Floats>(bits); }
inline Ints all(float value) { return Ints{} + std::bit_cast<int32_t>(value); }

// ---- one vector: load as fp32, store rounded. `count` columns of it, the others read as 0 ----

template <typename Vector, typename T>
Vector load_raw(const T* source, int count) {
  Vector raw = {};
  std::memcpy(&raw, source, count * sizeof(T));
  return raw;
}

inline Floats load(const float* source, int count) { return load_raw<Floats>(source, count); }

inline void store(float* out, Floats values, int count) { std::memcpy(out, &values, count * sizeof(float)); }

inline Ints widen(Halves halves) {
#if defined(__AVX2__)  // GCC makes four instructions of the conversion
  return std::bit_cast<Ints>(_mm256_cvtepu16_epi32(std::bit_cast<__m128i>(halves)));
#else
  return __builtin_convertvector(halves, Ints);
#endif
}

inline Halves narrow(Ints words) {  // each within 16 bits
#if defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32(std::bit_cast<__m256i>(words), std::bit_cast<__m256i>(words));
  return std::bit_cast<Halves>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
  return __builtin_convertvector(words, Halves);
#endif
}

inline Floats load(const Bf16* source, int count) { return floats_of(widen(load_raw<Halves>(source, count)) << 16); }

inline void store(Bf16* out, Floats values, int count) {
  const Ints bits = bits_of(values);
  const Ints rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Halves halves = narrow(((bits & 0x7fffffff) > 0x7f800000 ? Ints{} + 0x7fc0 : rounded) & 0xffff);
  std::memcpy(out, &halves, count * sizeof(Bf16));
}

#if defined(__F16C__)
inline Floats load(const F16* source, int count) {
  return std::bit_cast<Floats>(_mm256_cvtph_ps(std::bit_cast<__m128i>(load_raw<Halves>(source, count))));
}

inline void store(F16* out, Floats values, int count) {
  const __m128i halves = _mm256_cvtps_ph(std::bit_cast<__m256>(values), _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(out, &halves, count * sizeof(F16));
}
#else
inline Floats load(const F16* source, int count) {
  const Ints raw = widen(load_raw<Halves>(source, count));
  const Ints magnitude = (raw & 0x7fff) << 13;
  const Ints exponent = magnitude & 0x0f800000;
  const Ints normal = magnitude + (112 << 23);
  const Ints special = normal + (112 << 23);  // infinity, NaN
  const Ints subnormal = bits_of(floats_of(normal + (1 << 23)) - floats_of(Ints{} + (113 << 23)));
  return floats_of((exponent == 0x0f800000 ? special : exponent == 0 ? subnormal : normal) | (raw & 0x8000) << 16);
}

inline void store(F16* out, Floats values, int count) {
  const Ints sign = bits_of(values) >> 16 & 0x8000;
  const Ints bits = bits_of(values) & 0x7fffffff;
  const Ints special = bits > 0x7f800000 ? Ints{} + 0x7e00 : Ints{} + 0x7c00;
  // Adding 0.5 moves the last bit of a subnormal half to the last bit of the float: the addition rounds it.
  const Ints subnormal = bits_of(floats_of(bits) + 0.5f) - all(0.5f);
  const Ints normal = (bits - (112 << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
  const Ints half = bits >= (143 << 23) ? special : bits < (113 << 23) ? subnormal : normal;
  const Halves halves = narrow(half | sign);
  std::memcpy(out, &halves, count * sizeof(F16));
}
#endif

// e4m3 (no infinities, 448 the largest), saturating.
inline void store_e4m3(uint8_t* out, Floats values, int count) {
  const Ints sign = bits_of(values) >> 24 & 0x80;
  const Ints whole = bits_of(values) & 0x7fffffff;
  const Ints bits = whole > all(448.0f) ? all(448.0f) : whole;
  // 2^-9 is the step below 2^-6; adding 2^14 moves it to the last bit of the float.
  const Ints subnormal = bits_of(floats_of(bits) + 16384.0f) - all(16384.0f);
  const Ints normal = (bits - (120 << 23) + 0x7ffff + ((bits >> 20) & 1)) >> 20;
  const Ints eight = whole > 0x7f800000 ? Ints{} + 0x7f : bits < (121 << 23) ? subnormal : normal;
  const Bytes bytes = __builtin_convertvector(narrow(eight | sign), Bytes);
  std::memcpy(out, &bytes, count);
}

// Calls body(column, count) for 8 columns at a time; all but the last call get a count that the compiler knows.
template <typename Body>
inline void for_columns(int columns, Body&& body) {
  int column = 0;
  for (; column + kLanes <= columns; column += kLanes) body(column, std::integral_constant<int, kLanes>());
  if (column < columns) body(column, columns - column);
}

// ---- rows ----

// Squares are summed in double: their mean then does not depend on the order in which they were added.
class SquareSum {
 public:
  void add(Floats values) {
    add(low_, __builtin_shufflevector(values, values, 0, 1, 2, 3));
    add(high_, __builtin_shufflevector(values, values, 4, 5, 6, 7));
  }
  // 1 / sqrt(mean + eps), in fp32.
  float rstd(int columns, float eps) const {
    const HalfDoubles sums = low_ + high_;
    const double sum = sums[0] + sums[1] + sums[2] + sums[3];
    return 1.0f / std::sqrt(static_cast<float>(sum / columns) + eps);
  }

 private:
  static void add(HalfDoubles& sums, HalfFloats values) {
    const HalfDoubles wide = __builtin_convertvector(values, HalfDoubles);
    sums += wide * wide;
  }
  HalfDoubles low_ = {}, high_ = {};
};

// stored = round(sources[0] + ... + sources[n-1] + residual), added in fp32 in this order; residual may be null.
template <typename T>
void sum_row(T* stored, const T* const* sources, int num_sources, const T* residual, int hidden_size) {
  for_columns(hidden_size, [&](int column, auto count) {
    Floats sum = load(sources[0] + column, count);
    for (int s = 1; s < num_sources; ++s) sum += load(sources[s] + column, count);
    if (residual != nullptr) sum += load(residual + column, count);
    store(stored + column, sum, count);
  });
}

// A norm: its weight is of the rows' dtype, or fp32 beside 16-bit rows, and gets an offset in fp32.
struct Norm {
  Norm(float eps, float weight_offset, uint32_t variant)
      : eps(eps), addend(weight_addend(weight_offset)), float_weight((variant & TPF_FLOAT_WEIGHT) != 0) {}
  float eps, addend;
  bool float_weight;
};

template <typename T, typename Weight>
void norm_row_by(T* output, const T* row, const Weight* weight, int hidden_size, const Norm& norm) {
  SquareSum squares;
  for_columns(hidden_size, [&](int column, auto count) { squares.add(load(row + column, count)); });
  const float scale = squares.rstd(hidden_size, norm.eps);
  for_columns(hidden_size, [&](int column, auto count) {
    const Floats factors = load(weight + column, count) + norm.addend;
    store(output + column, load(row + column, count) * scale * factors, count);
  });
}

// output = rms_norm(row) * (weight + offset), of a row as stored.
template <typename T>
void norm_row(T* output, const T* row, const void* weight, int hidden_size, const Norm& norm) {
  norm.float_weight ? norm_row_by(output, row, static_cast<const float*>(weight), hidden_size, norm)
                    : norm_row_by(output, row, static_cast<const T*>(weight), hidden_size, norm);
}

// One row to e4m3 with a scale of amax / 448 for every `group_size` columns; a group of zeros has scale 0. Or, rounded
// up, with powers of two.
template <typename T>
void quantize_row(uint8_t* q, float* scale, int64_t scale_group_stride, const T* row, int hidden_size, int group_size,
                  bool round_scales) {
  for (int begin = 0; begin < hidden_size; begin += group_size, scale += scale_group_stride) {
    const int columns = std::min(group_size, hidden_size - begin);
    Ints largest = {};  // magnitudes of floats order as integers do, NaN above all
    for_columns(columns, [&](int column, auto count) {
      const Ints magnitude = bits_of(load(row + begin + column, count)) & 0x7fffffff;
      largest = magnitude > largest ? magnitude : largest;
    });
    int32_t amax_bits = 0;
    for (int lane = 0; lane < kLanes; ++lane) amax_bits = std::max(amax_bits, largest[lane]);
    const float amax = std::bit_cast<float>(amax_bits);
    *scale = amax / 448.0f;
    // Finite for the smallest numbers, too: zeros beside them stay zeros. A NaN stays one.
    float inverse = amax_bits != 0 ? std::min(448.0f / amax, std::numeric_limits<float>::max()) : 0.0f;
    if (round_scales && std::isfinite(amax)) {
      const uint32_t bits = rounded_scale_bits(std::bit_cast<uint32_t>(*scale));
      *scale = std::bit_cast<float>(bits);
      inverse = std::bit_cast<float>(reciprocal_bits(bits));
    }
    for_columns(columns, [&](int column, auto count) {
      store_e4m3(q + begin + column, load(row + begin + column, count) * inverse, count);
    });
  }
}

// Calls `body.operator()<T>()` with the element type of `dtype`.
template <typename Body>
tpf_status visit(tpf_dtype dtype, Body&& body) {
  switch (dtype) {
    case TPF_BF16:
      return body.template operator()<Bf16>();
    case TPF_F16:
      return body.template operator()<F16>();
    case TPF_F32:
      return body.template operator()<float>();
    default:
      return TPF_UNSUPPORTED;
  }
}

}  // namespace tpf
