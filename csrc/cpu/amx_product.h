// Products of packed bfloat16 matrices by AMX: 32 x 32 sums in four tile registers, in float32. The
// only element is bfloat16.
#pragma once

#include "cpu/packed_lanes.h"

namespace speeder {
namespace SPEEDER_ISA {
namespace {

constexpr int kTileRows = 32;
constexpr int kTileVecs = 4;
constexpr int64_t kSide = 16;  // rows, and lanes in a row, of a tile register

// Registers 0 to 3 hold sums (two rows of two), 4 and 5 rows of a, 6 and 7 columns of b.
inline void configure(int64_t upper_rows, int64_t lower_rows, int64_t lanes) {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int n = 0; n < 8; ++n) {
    const bool of_a = n == 4 || n == 5, of_b = n >= 6, upper = n < 2 || n == 4;
    config.row_bytes[n] = static_cast<uint16_t>(4 * (of_a ? lanes : kSide));
    config.rows[n] = static_cast<uint8_t>(of_b ? lanes : upper ? upper_rows : lower_rows);
  }
  _tile_loadconfig(&config);
}

// While one lives, `product` can be called on its thread, and nothing else may use AMX there.
class TileRegisters {
 public:
  TileRegisters() { configure(kSide, kSide, kSide); }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

// One or two tiles of rows times one or two of columns, `depth` lanes in whole registers.
template <bool kTwoRows, bool kTwoColumns>
inline void tiles(int64_t depth, int64_t step, const Pair* a, int64_t lda, const Pair* b,
                  int64_t ldb, float* c, int64_t ldc, bool add) {
  constexpr int64_t kBytes = 4;  // of a lane
  float* const c_lower = c + kSide * ldc;
  if (add) {
    _tile_loadd(0, c, ldc * kBytes);
    if (kTwoColumns) _tile_loadd(1, c + kSide, ldc * kBytes);
    if (kTwoRows) _tile_loadd(2, c_lower, ldc * kBytes);
    if (kTwoRows && kTwoColumns) _tile_loadd(3, c_lower + kSide, ldc * kBytes);
  } else {
    _tile_zero(0);
    if (kTwoColumns) _tile_zero(1);
    if (kTwoRows) _tile_zero(2);
    if (kTwoRows && kTwoColumns) _tile_zero(3);
  }
  for (int64_t d = 0; d < depth; d += step) {
    _tile_loadd(4, a + d, lda * kBytes);
    if (kTwoRows) _tile_loadd(5, a + kSide * lda + d, lda * kBytes);
    _tile_loadd(6, b + d * ldb, ldb * kBytes);
    if (kTwoColumns) _tile_loadd(7, b + d * ldb + kSide, ldb * kBytes);
    _tile_dpbf16ps(0, 4, 6);
    if (kTwoColumns) _tile_dpbf16ps(1, 4, 7);
    if (kTwoRows) _tile_dpbf16ps(2, 5, 6);
    if (kTwoRows && kTwoColumns) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, ldc * kBytes);
  if (kTwoColumns) _tile_stored(1, c + kSide, ldc * kBytes);
  if (kTwoRows) _tile_stored(2, c_lower, ldc * kBytes);
  if (kTwoRows && kTwoColumns) _tile_stored(3, c_lower + kSide, ldc * kBytes);
}

// All columns, `step` lanes of depth at a time, for which the registers are configured.
inline void columns(int64_t rows, int64_t vecs, int64_t depth, int64_t step, const Pair* a,
                    int64_t lda, const Pair* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  const auto two = rows > kSide ? tiles<true, true> : tiles<false, true>;
  const auto one = rows > kSide ? tiles<true, false> : tiles<false, false>;
  int64_t v = 0;
  for (; v + 2 <= vecs; v += 2) {
    two(depth, step, a, lda, b + v * kSide, ldb, c + v * kSide, ldc, add);
  }
  if (v < vecs) one(depth, step, a, lda, b + v * kSide, ldb, c + v * kSide, ldc, add);
}

// c (rows x vecs vectors) = or += a (rows x depth) b (depth x vecs vectors), for 1 .. kTileRows
// rows. Where kTransposed, a lies as (depth x rows).
template <bool kTransposed>
inline void product(int64_t rows, int64_t vecs, int64_t depth, const Pair* a, int64_t lda,
                    const Pair* b, int64_t ldb, float* c, int64_t ldc, bool add);

template <>
inline void product<false>(int64_t rows, int64_t vecs, int64_t depth, const Pair* a, int64_t lda,
                           const Pair* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  const int64_t upper = smaller(rows, kSide), lower = rows > kSide ? rows - kSide : kSide;
  const int64_t whole = depth / kSide * kSide, left = depth - whole;
  const bool part = upper < kSide || lower < kSide;
  if (part) configure(upper, lower, kSide);
  if (whole > 0) columns(rows, vecs, whole, kSide, a, lda, b, ldb, c, ldc, add);
  if (left > 0) {
    configure(upper, lower, left);
    columns(rows, vecs, left, left, a + whole, lda, b + whole * ldb, ldb, c, ldc, add || whole > 0);
  }
  if (part || left > 0) configure(kSide, kSide, kSide);
}

template <>
inline void product<true>(int64_t rows, int64_t vecs, int64_t depth, const Pair* a, int64_t lda,
                          const Pair* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  constexpr int64_t kDepth = 4 * kSide;  // lanes that are turned at once
  alignas(64) Pair turned[kTileRows * kDepth];
  Vec square[kSide];
  for (int64_t first = 0; first < depth; first += kDepth) {
    const int64_t count = smaller(kDepth, depth - first);
    for (int64_t r = 0; r < rows; r += kSide) {
      const size_t bytes = smaller(kSide, rows - r) * sizeof(Pair);
      for (int64_t d = 0; d < count; d += kSide) {
        for (int64_t i = 0; i < kSide; ++i) {
          square[i] = Vec{};
          if (d + i >= count) continue;
          __builtin_memcpy(&square[i], a + (first + d + i) * lda + r, bytes);
        }
        transpose(square);
        for (int64_t i = 0; i < kSide; ++i) {
          __builtin_memcpy(turned + (r + i) * kDepth + d, &square[i], sizeof(Vec));
        }
      }
    }
    product<false>(rows, vecs, count, turned, kDepth, b + first * ldb, ldb, c, ldc,
                   add || first > 0);
  }
}

}  // namespace
}  // namespace SPEEDER_ISA
}  // namespace speeder
