// Products of packed matrices by vector registers: kTileRows rows times kTileVecs vectors are
// summed in them, in float32.
#pragma once

#include "cpu/packed_lanes.h"

namespace speeder {
namespace SPEEDER_ISA {
namespace {

// As many sums as the registers hold beside the operands: 24 of 32, or 12 of 16.
constexpr int kTileRows = 6;
constexpr int kTileVecs = kWidth == 16 ? 4 : 2;

// Instruction sets with registers of their own for products have them ready while one lives.
struct TileRegisters {
  TileRegisters() {}  // of our own, or compilers would call it unused
};

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

}  // namespace
}  // namespace SPEEDER_ISA
}  // namespace speeder
