// 16-byte vectors of rows, to and from fp32; the sum over a warp.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cfloat>
#include <cstdint>

#include "../../protocol.h"

namespace tpf {

template <typename T>
constexpr int kLanes = 16 / sizeof(T);  // elements of one 16-byte vector

// Loads that see what peers wrote: never through the read-only path, and not kept in L1, where no line is read twice.
__device__ inline uint4 load16(const void* address) {
  uint4 raw;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(raw.x), "=r"(raw.y), "=r"(raw.z), "=r"(raw.w)
               : "l"(address)
               : "memory");
  return raw;
}

// Of words that others write meanwhile: each is read once, and not out of a cache that knows nothing of it.
__device__ inline uint4 load16_relaxed(const void* address) {
  uint4 raw;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(raw.x), "=r"(raw.y), "=r"(raw.z), "=r"(raw.w)
               : "l"(address)
               : "memory");
  return raw;
}

__device__ inline void store16(void* address, uint4 raw) { *static_cast<uint4*>(address) = raw; }

// Of what is not read again soon: it shall not drive out of the L2 cache what is.
__device__ inline void store16_streaming(void* address, uint4 raw) { __stcs(static_cast<uint4*>(address), raw); }

__device__ inline void unpack(float (&values)[8], uint4 raw, __nv_bfloat16) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = __uint_as_float(words[i] << 16);
    values[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

__device__ inline void unpack(float (&values)[8], uint4 raw, __half) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
    values[2 * i] = pair.x;
    values[2 * i + 1] = pair.y;
  }
}

__device__ inline void unpack(float (&values)[4], uint4 raw, float) {
  values[0] = __uint_as_float(raw.x);
  values[1] = __uint_as_float(raw.y);
  values[2] = __uint_as_float(raw.z);
  values[3] = __uint_as_float(raw.w);
}

__device__ inline uint32_t pack2(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ inline uint32_t pack2(float low, float high, __half) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

template <typename T>
__device__ inline uint4 pack(const float (&values)[8], T type) {
  return {pack2(values[0], values[1], type), pack2(values[2], values[3], type), pack2(values[4], values[5], type),
          pack2(values[6], values[7], type)};
}

__device__ inline uint4 pack(const float (&values)[4], float) {
  return {__float_as_uint(values[0]), __float_as_uint(values[1]), __float_as_uint(values[2]),
          __float_as_uint(values[3])};
}

// Some columns of a norm's weight: a vector's, or one. Through the read-only path: nobody writes it meanwhile.
template <int kWidth, typename T>
__device__ inline void load_weight(float (&values)[kWidth], const T* weight) {
  if constexpr (kWidth == 1) {
    values[0] = static_cast<float>(__ldg(weight));
  } else {
#pragma unroll
    for (int begin = 0; begin < kWidth; begin += kLanes<T>) {
      float vector[kLanes<T>];
      unpack(vector, __ldg(reinterpret_cast<const uint4*>(weight + begin)), T{});
#pragma unroll
      for (int i = 0; i < kLanes<T>; ++i) values[begin + i] = vector[i];
    }
  }
}

// Columns `column` and following of one that is fp32 or, as rows are, T; what is added to it (protocol.h:
// weight_addend), too.
template <typename T, int kWidth>
__device__ inline void load_norm_weight(float (&values)[kWidth], const void* weight, int column, bool is_float,
                                        float addend) {
  if (is_float) {
    load_weight(values, static_cast<const float*>(weight) + column);
  } else {
    load_weight(values, static_cast<const T*>(weight) + column);
  }
#pragma unroll
  for (float& value : values) value += addend;
}

struct Sum {
  __device__ float operator()(float one, float other) const { return one + other; }
};
struct Max {
  __device__ float operator()(float one, float other) const { return fmaxf(one, other); }
};

// Of `lanes` lanes that lie together, a power of two of them.
template <typename Combine>
__device__ inline float warp_reduce(float value, Combine combine, int lanes = 32) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    if (offset < lanes) value = combine(value, __shfl_xor_sync(0xffffffffu, value, offset));
  }
  return value;
}
__device__ inline float warp_sum(float value) { return warp_reduce(value, Sum{}); }

// Of fp8 values whose largest magnitude is amax: their scale, and what they are multiplied by before they are rounded.
// Finite for the smallest numbers, too: zeros beside them stay zeros.
struct Fp8Scale {
  __device__ Fp8Scale(float amax, bool rounded) {
    // The bits of __fdiv_rn, without its branches: the compiler schedules nothing across them.
    if (amax >= 0x1p-60f && amax <= 0x1p60f) {
      scale = refined_quotient(amax, 448.0f, 1 / 448.0f, amax * (1 / 448.0f));
      float reciprocal = rcp_approx(amax);
      reciprocal = fmaf(reciprocal, fmaf(-amax, reciprocal, 1.0f), reciprocal);
      inverse = refined_quotient(448.0f, amax, reciprocal, 448.0f * reciprocal);
    } else {
      scale = __fdiv_rn(amax, 448.0f);
      inverse = amax > 0 ? fminf(__fdiv_rn(448.0f, amax), FLT_MAX) : 0.0f;
    }
    if (rounded && amax <= FLT_MAX) {
      const uint32_t bits = rounded_scale_bits(__float_as_uint(scale));
      scale = __uint_as_float(bits);
      inverse = __uint_as_float(reciprocal_bits(bits));
    }
  }
  float scale, inverse;

 private:
  // number / divisor, rounded to nearest: from an approximation, and the divisor's reciprocal (Markstein 1990).
  __device__ static float refined_quotient(float number, float divisor, float reciprocal, float quotient) {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      quotient = fmaf(fmaf(-divisor, quotient, number), reciprocal, quotient);
    }
    return quotient;
  }
  __device__ static float rcp_approx(float value) {
    float reciprocal;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(value));
    return reciprocal;
  }
};

// e4m3, saturating, rounded to nearest even; the low 32 bits hold the first four.
template <int kCount>
__device__ inline void store_e4m3(uint8_t* out, const float (&values)[kCount], float scale) {
  uint32_t words[kCount / 4];
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i) {
    const auto low =
        __nv_cvt_float2_to_fp8x2({values[4 * i] * scale, values[4 * i + 1] * scale}, __NV_SATFINITE, __NV_E4M3);
    const auto high =
        __nv_cvt_float2_to_fp8x2({values[4 * i + 2] * scale, values[4 * i + 3] * scale}, __NV_SATFINITE, __NV_E4M3);
    words[i] = low | uint32_t{high} << 16;
  }
  if constexpr (kCount == 8) {
    *reinterpret_cast<uint2*>(out) = {words[0], words[1]};
  } else {
    *reinterpret_cast<uint32_t*>(out) = words[0];
  }
}

}  // namespace tpf
