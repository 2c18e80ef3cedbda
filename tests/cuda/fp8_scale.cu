// Whether Fp8Scale has the bits of divisions that are rounded to nearest, for every amax that is not negative, and NaN.
// Prints how many differ, and one of them.
#include <cstdio>

#include "cuda/ptx/vec.cuh"

__device__ unsigned long long differing;
__device__ unsigned one;

__global__ void compare() {
  const unsigned step = gridDim.x * blockDim.x;
  for (unsigned bits = blockIdx.x * blockDim.x + threadIdx.x; bits < 0x80000000u; bits += step) {
    const float amax = __uint_as_float(bits);
    const tpf::Fp8Scale found(amax, false);
    const float scale = __fdiv_rn(amax, 448.0f);
    const float inverse = amax > 0 ? fminf(__fdiv_rn(448.0f, amax), FLT_MAX) : 0.0f;
    if (__float_as_uint(found.scale) != __float_as_uint(scale) ||
        __float_as_uint(found.inverse) != __float_as_uint(inverse)) {
      atomicAdd(&differing, 1);
      one = bits;
    }
  }
}

int main() {
  unsigned long long count = 1;
  unsigned bits = 0;
  compare<<<1024, 256>>>();
  const cudaError_t error = cudaDeviceSynchronize();
  cudaMemcpyFromSymbol(&count, differing, sizeof(count));
  cudaMemcpyFromSymbol(&bits, one, sizeof(bits));
  std::printf("%s: %llu differ, 0x%08x\n", cudaGetErrorString(error), count, bits);
  return error != cudaSuccess || count != 0;
}
