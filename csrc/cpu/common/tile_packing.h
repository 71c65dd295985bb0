// Copies rows of a tensor into the layouts that a register tile reads: as floats, or as pairs of
// bfloat16 (see packed_lanes.h). `in` is rows x size elements, rows `stride` apart; leading
// dimensions count lanes and are whole vectors; what lies past the data is zero. Included once for
// each instruction set.
#pragma once

#include "cpu/common/packed_lanes.h"

namespace speeder {
namespace SPEEDER_ISA {
namespace {

// A vector of lanes from `size` (at least one) neighbouring elements, as bits.
template <typename T>
inline Vec load_lanes(const T* p, int64_t size, const float*) {
  return size >= kWidth ? load(p) : load_part(p, size);
}

inline Vec load_lanes(const BFloat16* p, int64_t size, const Pair*) {
  Vec out = {};
  if (size >= 2 * kWidth) {
    __builtin_memcpy(&out, p, sizeof(out));
  } else {
    __builtin_memcpy(&out, p, size * sizeof(*p));
  }
  return out;
}

inline void store_lanes(float* p, Vec x) { store(p, x); }
inline void store_lanes(Pair* p, Vec x) { __builtin_memcpy(p, &x, sizeof(x)); }

// Row by row, depth along the row: a left operand (rows x depth).
template <typename T, typename P>
inline void pack_rows(const T* in, int64_t stride, int64_t rows, int64_t size, P* out, int64_t ld) {
  const int64_t step = kWidth * kInLane<P>;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t d = 0; d < size; d += step) {
      store_lanes(out + r * ld + d / kInLane<P>, load_lanes(in + r * stride + d, size - d, out));
    }
  }
}

// Rows become columns: a right operand (depth x rows) whose depth lies along the rows of `in`.
template <typename T, typename P>
inline void pack_columns(const T* in, int64_t stride, int64_t rows, int64_t size, P* out,
                         int64_t ld) {
  const int64_t step = kWidth * kInLane<P>;
  Vec square[kWidth];
  for (int64_t r = 0; r < rows; r += kWidth) {
    for (int64_t d = 0; d < size; d += step) {
      const T* from = in + r * stride + d;
      if (r + kWidth <= rows && d + step <= size) {
        for (int i = 0; i < kWidth; ++i) square[i] = load_lanes(from + i * stride, step, out);
      } else {
        for (int i = 0; i < kWidth; ++i) {
          square[i] = r + i < rows ? load_lanes(from + i * stride, size - d, out) : Vec{};
        }
      }
      transpose(square);
      for (int i = 0; i < kWidth; ++i) store_lanes(out + (d / kInLane<P> + i) * ld + r, square[i]);
    }
  }
}

// Depth down the rows: a right operand (rows x size), two rows in one where lanes hold pairs.
template <typename T>
inline void pack_depth(const T* in, int64_t stride, int64_t rows, int64_t size, float* out,
                       int64_t ld) {
  pack_rows(in, stride, rows, size, out, ld);
}

// Lane i: a[i] and b[i].
inline Vec interleave(Bits a, Bits b) { return bitcast<Vec>(a | b << 16); }

#if defined(__AVX512BF16__)
// The same of two vectors of floats, rounded.
inline Vec interleave(Vec a, Vec b) {
  const __m512bh halves = _mm512_cvtne2ps_pbh(bitcast<__m512>(b), bitcast<__m512>(a));
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return bitcast<Vec>(_mm512_maskz_permutexvar_epi16(~0u, order, bitcast<__m512i>(halves)));
}
#endif

// The bits of `size` bfloat16, each in a lane.
inline Bits load_bits(const BFloat16* p, int64_t size) {
  Shorts out = {};
  if (size >= kWidth) {
    __builtin_memcpy(&out, p, sizeof(out));
  } else {
    __builtin_memcpy(&out, p, size * sizeof(*p));
  }
  return __builtin_convertvector(out, Bits);
}

inline void pack_depth(const BFloat16* in, int64_t stride, int64_t rows, int64_t size, Pair* out,
                       int64_t ld) {
  for (int64_t r = 0; r < rows; r += 2) {
    const BFloat16* from = in + r * stride;
    for (int64_t d = 0; d < size; d += kWidth) {
      const Bits second = r + 1 < rows ? load_bits(from + stride + d, size - d) : Bits{};
      store_lanes(out + r / 2 * ld + d, interleave(load_bits(from + d, size - d), second));
    }
  }
}

}  // namespace
}  // namespace SPEEDER_ISA
}  // namespace speeder
