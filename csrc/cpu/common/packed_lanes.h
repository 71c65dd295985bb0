// Elements as packed operands hold them: the depth of a product is counted in lanes of 32 bits, one
// float each, or where the processor multiplies them (AVX-512-BF16, AMX), two bfloat16. Included
// once for each instruction set, like vec.h.
#pragma once

#include "cpu/common/vec.h"

namespace speeder {
namespace SPEEDER_ISA {
namespace {

// Two neighbours along the depth of a product, in one lane.
struct Pair {
  BFloat16 first, second;
};

// How elements of type T lie in a packed operand, and how many share a lane.
#if defined(__AVX512BF16__)
template <typename T>
struct PackedAs {
  using Type = float;
};
template <>
struct PackedAs<BFloat16> {
  using Type = Pair;
};
template <typename T>
using Packed = typename PackedAs<T>::Type;
#else
template <typename T>
using Packed = float;
#endif
template <typename P>
constexpr int64_t kInLane = 1;
template <>
constexpr int64_t kInLane<Pair> = 2;

// Lanes for `count` elements along the depth.
template <typename P>
inline int64_t lanes_of(int64_t count) {
  return (count + kInLane<P> - 1) / kInLane<P>;
}

inline Ints load(const Pair* p) {
  Ints out;
  __builtin_memcpy(&out, p, sizeof(out));
  return out;
}

inline Ints splat(Pair x) { return bitcast<int32_t>(x) - Ints{}; }

inline Vec multiply_add(Vec a, Vec b, Vec sum) { return sum + a * b; }

inline Vec multiply_add(Ints a, Ints b, Vec sum) {
#if defined(__AVX512BF16__)
  return bitcast<Vec>(
      _mm512_dpbf16_ps(bitcast<__m512>(sum), bitcast<__m512bh>(a), bitcast<__m512bh>(b)));
#else
  (void)a, (void)b;
  return sum;  // never called: Packed<T> is float
#endif
}

}  // namespace
}  // namespace SPEEDER_ISA
}  // namespace speeder
