// Products of small float matrices that lie in a cache, by register tiles: kTileRows rows times
// kTileVecs vectors are summed in registers. Included once for each instruction set, like vec.h.
#pragma once

#include "cpu/vec.h"

namespace speeder {
namespace SPEEDER_ISA {
namespace {

// As many sums as the registers hold beside the operands: 24 of 32, or 12 of 16.
constexpr int kTileRows = 6;
constexpr int kTileVecs = kWidth == 16 ? 4 : 2;

// c (kRows x kVecs vectors) = or += a (kRows x depth) b (depth x kVecs vectors). Where kTransposed,
// a lies as (depth x kRows).
template <int kRows, int kVecs, bool kTransposed, typename T>
void tile(int64_t depth, const float* a, int64_t lda, const T* b, int64_t ldb, float* c,
          int64_t ldc, bool add) {
  Vec sums[kRows][kVecs];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) sums[r][v] = add ? load(c + r * ldc + v * kWidth) : Vec{};
  }
  for (int64_t d = 0; d < depth; ++d) {
    Vec row[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) row[v] = load(b + d * ldb + v * kWidth);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const Vec factor = splat(kTransposed ? a[d * lda + r] : a[r * lda + d]);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sums[r][v] += factor * row[v];
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) store(c + r * ldc + v * kWidth, sums[r][v]);
  }
}

template <typename T>
using Tile = void (*)(int64_t depth, const float* a, int64_t lda, const T* b, int64_t ldb, float* c,
                      int64_t ldc, bool add);

template <int kVecs, bool kTransposed, typename T>
inline Tile<T> tile_of(int64_t rows) {
  static constexpr Tile<T> kByRows[kTileRows] = {
      tile<1, kVecs, kTransposed, T>, tile<2, kVecs, kTransposed, T>,
      tile<3, kVecs, kTransposed, T>, tile<4, kVecs, kTransposed, T>,
      tile<5, kVecs, kTransposed, T>, tile<6, kVecs, kTransposed, T>};
  return kByRows[rows - 1];
}

template <bool kTransposed, typename T>
inline Tile<T> find_tile(int64_t rows, int64_t vecs) {
  switch (vecs) {
    case 1:
      return tile_of<1, kTransposed, T>(rows);
    case 2:
      return tile_of<2, kTransposed, T>(rows);
#if defined(__AVX512F__)
    case 3:
      return tile_of<3, kTransposed, T>(rows);
    case 4:
      return tile_of<4, kTransposed, T>(rows);
#endif
  }
  __builtin_unreachable();
}

// As tile(), for 1 .. kTileRows rows and any number of vectors.
template <bool kTransposed, typename T>
inline void product(int64_t rows, int64_t vecs, int64_t depth, const float* a, int64_t lda,
                    const T* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  for (int64_t v = 0; v < vecs; v += kTileVecs) {
    const Tile<T> tile = find_tile<kTransposed, T>(rows, smaller(kTileVecs, vecs - v));
    tile(depth, a, lda, b + v * kWidth, ldb, c + v * kWidth, ldc, add);
  }
}

// rows x size elements, `stride` apart, times `factor` into out (rows x ld); zero up to ld.
template <typename T>
inline void pack_rows(const T* in, int64_t stride, int64_t rows, int64_t size, float factor,
                      float* out, int64_t ld) {
  const int64_t whole = size / kWidth * kWidth;
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = in + r * stride;
    float* to = out + r * ld;
    for (int64_t d = 0; d < whole; d += kWidth) store(to + d, load(from + d) * factor);
    if (whole < size) store(to + whole, load_part(from + whole, size - whole) * factor);
  }
}

// rows x size elements, `stride` apart, into out (size rounded up x ld) with rows and columns
// exchanged; zero up to ld, which is `rows` rounded up to whole vectors.
template <typename T>
inline void pack_transposed(const T* in, int64_t stride, int64_t rows, int64_t size, float* out,
                            int64_t ld) {
  Vec square[kWidth];
  for (int64_t r = 0; r < rows; r += kWidth) {
    for (int64_t d = 0; d < size; d += kWidth) {
      const T* from = in + r * stride + d;
      if (r + kWidth <= rows && d + kWidth <= size) {
        for (int i = 0; i < kWidth; ++i) square[i] = load(from + i * stride);
      } else {
        const int64_t columns = smaller(kWidth, size - d);
        for (int i = 0; i < kWidth; ++i) {
          if (r + i >= rows) {
            square[i] = Vec{};
          } else if (columns == kWidth) {
            square[i] = load(from + i * stride);
          } else {
            square[i] = load_part(from + i * stride, columns);
          }
        }
      }
      transpose(square);
      for (int i = 0; i < kWidth; ++i) store(out + (d + i) * ld + r, square[i]);
    }
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
