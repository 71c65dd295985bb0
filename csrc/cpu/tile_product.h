// Products of small matrices that lie in a cache, by register tiles: kTileRows rows times kTileVecs
// vectors are summed in registers, in float32. The depth of a product is counted in lanes of 32
// bits: one float each, or where the processor multiplies them (AVX-512-BF16), two bfloat16.
// Included once for each instruction set, like vec.h.
#pragma once

#include "cpu/vec.h"

namespace speeder {
namespace SPEEDER_ISA {
namespace {

// As many sums as the registers hold beside the operands: 24 of 32, or 12 of 16.
constexpr int kTileRows = 6;
constexpr int kTileVecs = kWidth == 16 ? 4 : 2;

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

// c (kRows x kVecs vectors) = or += a (kRows x depth) b (depth x kVecs vectors). Where kTransposed,
// a lies as (depth x kRows).
template <int kRows, int kVecs, bool kTransposed, typename A, typename B>
void tile(int64_t depth, const A* a, int64_t lda, const B* b, int64_t ldb, float* c, int64_t ldc,
          bool add) {
  Vec sums[kRows][kVecs];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) sums[r][v] = add ? load(c + r * ldc + v * kWidth) : Vec{};
  }
  for (int64_t d = 0; d < depth; ++d) {
    decltype(load(b)) row[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) row[v] = load(b + d * ldb + v * kWidth);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const auto factor = splat(kTransposed ? a[d * lda + r] : a[r * lda + d]);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sums[r][v] = multiply_add(factor, row[v], sums[r][v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) store(c + r * ldc + v * kWidth, sums[r][v]);
  }
}

template <typename A, typename B>
using Tile = void (*)(int64_t depth, const A* a, int64_t lda, const B* b, int64_t ldb, float* c,
                      int64_t ldc, bool add);

template <int kVecs, bool kTransposed, typename A, typename B>
inline Tile<A, B> tile_of(int64_t rows) {
  static constexpr Tile<A, B> kByRows[kTileRows] = {
      tile<1, kVecs, kTransposed, A, B>, tile<2, kVecs, kTransposed, A, B>,
      tile<3, kVecs, kTransposed, A, B>, tile<4, kVecs, kTransposed, A, B>,
      tile<5, kVecs, kTransposed, A, B>, tile<6, kVecs, kTransposed, A, B>};
  return kByRows[rows - 1];
}

template <bool kTransposed, typename A, typename B>
inline Tile<A, B> find_tile(int64_t rows, int64_t vecs) {
  switch (vecs) {
    case 1:
      return tile_of<1, kTransposed, A, B>(rows);
    case 2:
      return tile_of<2, kTransposed, A, B>(rows);
#if defined(__AVX512F__)
    case 3:
      return tile_of<3, kTransposed, A, B>(rows);
    case 4:
      return tile_of<4, kTransposed, A, B>(rows);
#endif
  }
  __builtin_unreachable();
}

// As tile(), for 1 .. kTileRows rows and any number of vectors.
template <bool kTransposed, typename A, typename B>
inline void product(int64_t rows, int64_t vecs, int64_t depth, const A* a, int64_t lda, const B* b,
                    int64_t ldb, float* c, int64_t ldc, bool add) {
  for (int64_t v = 0; v < vecs; v += kTileVecs) {
    const Tile<A, B> tile = find_tile<kTransposed, A, B>(rows, smaller(kTileVecs, vecs - v));
    tile(depth, a, lda, b + v * kWidth, ldb, c + v * kWidth, ldc, add);
  }
}

// out = in (float) times `factor`, `size` elements.
template <typename T>
inline void store_row(T* out, const float* in, int64_t size, float factor) {
  const int64_t whole = size / kWidth * kWidth;
  for (int64_t d = 0; d < whole; d += kWidth) store(out + d, load(in + d) * factor);
  if (whole < size) store_part(out + whole, load(in + whole) * factor, size - whole);
}

}  // namespace
}  // namespace SPEEDER_ISA
}  // namespace speeder
