// Element types that the kernels take, and their conversion to and from float. No torch header:
// the CPU kernels, the CUDA kernels and the tests that run device code on the host all include it.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_fp16.h>
#define SPEEDER_DEVICE __device__ __forceinline__
#define SPEEDER_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SPEEDER_DEVICE inline
#define SPEEDER_HOST_DEVICE inline
#endif

namespace speeder {

enum class DType { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

// All are `static`: files built for different instruction sets each keep their own copy, so the
// linker cannot hand an AVX-512 copy to the portable code.
static SPEEDER_HOST_DEVICE float to_float(float x) { return x; }

static SPEEDER_HOST_DEVICE float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  memcpy(&out, &bits, sizeof(out));
  return out;
}

static SPEEDER_HOST_DEVICE float to_float(Half x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#elif defined(__CUDACC__)
  return 0.0f * x.bits;  // nvcc's host pass: only device code converts a Half
#else
  _Float16 value;
  memcpy(&value, &x.bits, sizeof(value));
  return static_cast<float>(value);
#endif
}

template <typename T>
static SPEEDER_HOST_DEVICE T from_float(float x);

template <>
SPEEDER_HOST_DEVICE float from_float<float>(float x) {
  return x;
}

// Round to nearest, ties to even; a NaN stays a (quiet) NaN.
template <>
SPEEDER_HOST_DEVICE BFloat16 from_float<BFloat16>(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  return BFloat16{static_cast<uint16_t>(is_nan ? (bits >> 16) | 0x40u : rounded)};
}

template <>
SPEEDER_HOST_DEVICE Half from_float<Half>(float x) {
#ifdef __CUDA_ARCH__
  return Half{__half_as_ushort(__float2half_rn(x))};
#elif defined(__CUDACC__)
  return Half{static_cast<uint16_t>(x != x)};  // nvcc's host pass, as above
#else
  const _Float16 value = static_cast<_Float16>(x);
  Half out;
  memcpy(&out.bits, &value, sizeof(value));
  return out;
#endif
}

}  // namespace speeder
