// Products of packed matrices by vector registers: kRegisterRows rows times kTileVecs vectors are
// summed in them, in float32.
#pragma once

#include "cpu/common/packed_lanes.h"

namespace speeder {
namespace SPEEDER_ISA {
namespace {

// As many sums as the registers hold beside the operands: 24 of 32, or 12 of 16.
constexpr int kRegisterRows = 6;
constexpr int kTileVecs = kWidth == 16 ? 4 : 2;

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
  static constexpr Tile<A, B> kByRows[kRegisterRows] = {
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

// As tile(), for any number of rows and vectors.
template <bool kTransposed, typename A, typename B>
inline void register_product(int64_t rows, int64_t vecs, int64_t depth, const A* a, int64_t lda,
                             const B* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  for (int64_t r = 0; r < rows; r += kRegisterRows) {
    const A* first = kTransposed ? a + r : a + r * lda;
    for (int64_t v = 0; v < vecs; v += kTileVecs) {
      const Tile<A, B> tile = find_tile<kTransposed, A, B>(smaller(kRegisterRows, rows - r),
                                                           smaller(kTileVecs, vecs - v));
      tile(depth, first, lda, b + v * kWidth, ldb, c + r * ldc + v * kWidth, ldc, add);
    }
  }
}

}  // namespace
}  // namespace SPEEDER_ISA
}  // namespace speeder
