// Products of packed bfloat16 matrices by AMX: 32 x 32 sums in four tile registers, in float32.
// Very small products go to vector registers.
#pragma once

#include "cpu/common/register_product.h"
#include "cpu/common/tile_limits.h"
#include "cpu/common/tile_packing.h"

namespace speeder {
namespace SPEEDER_ISA {
namespace {

constexpr int kTileRows = 32;
static_assert(kTileRows <= kMostTileRows, "scratch fits every tile");
constexpr int64_t kSide = 16;  // rows, and lanes in a row, of a tile register

// One for each thread that multiplies, while it does: configures the tile registers as products
// need them, which takes longer than a small product, and gives them back. Nothing else may use AMX
// on the thread meanwhile.
class TileRegisters {
 public:
  TileRegisters() = default;
  ~TileRegisters() {
    if (lanes_ > 0) _tile_release();
  }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

  // Registers 0 to 3 hold sums (two rows of two), 4 and 5 rows of a, 6 and 7 columns of b; `lanes`
  // are the depth of a and b.
  void configure(int64_t upper_rows, int64_t lower_rows, int64_t lanes) {
    if (upper_rows == upper_rows_ && lower_rows == lower_rows_ && lanes == lanes_) return;
    upper_rows_ = upper_rows, lower_rows_ = lower_rows, lanes_ = lanes;
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
    // Some releases of GCC believe that only 8 bytes are read, and leave out what sets the others.
    __asm__ volatile("" : "+m"(config));
    _tile_loadconfig(&config);
  }

 private:
  int64_t upper_rows_ = 0, lower_rows_ = 0, lanes_ = 0;
};

// One or two tiles of rows times one or two of columns; `depth` is a multiple of `step`.
template <bool kTwoRows, bool kTwoColumns>
inline void tiles(int64_t depth, int64_t step, const Pair* a, int64_t lda, const Pair* b,
                  int64_t ldb, float* c, int64_t ldc, bool add) {
  constexpr int64_t kBytes = 4;  // of a lane
  float* const c_lower = c + kSide * ldc;
  // GCC does not know that loads of tiles read memory: all stores come before them.
  __asm__ volatile("" ::: "memory");
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

// All columns. The registers are configured for `step` lanes of depth.
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
inline void product(TileRegisters& registers, int64_t rows, int64_t vecs, int64_t depth,
                    const Pair* a, int64_t lda, const Pair* b, int64_t ldb, float* c, int64_t ldc,
                    bool add) {
  constexpr int64_t kSmall = 512;  // vectors multiplied: about what two configurations take
  if (rows * vecs * depth < kSmall) {
    return register_product<kTransposed>(rows, vecs, depth, a, lda, b, ldb, c, ldc, add);
  }
  if (kTransposed) {
    constexpr int64_t kDepth = 4 * kSide;  // lanes that are turned at once
    alignas(64) Pair turned[kTileRows * kDepth];
    for (int64_t first = 0; first < depth; first += kDepth) {
      const int64_t lanes = smaller(kDepth, depth - first);
      pack_columns(reinterpret_cast<const float*>(a + first * lda), lda, lanes, rows,
                   reinterpret_cast<float*>(turned), kDepth);  // lane by lane, whatever is in them
      product<false>(registers, rows, vecs, lanes, turned, kDepth, b + first * ldb, ldb, c, ldc,
                     add || first > 0);
    }
    return;
  }
  const int64_t upper = smaller(rows, kSide), lower = rows > kSide ? rows - kSide : kSide;
  const int64_t whole = depth / kSide * kSide, left = depth - whole;
  if (whole > 0) {
    registers.configure(upper, lower, kSide);
    columns(rows, vecs, whole, kSide, a, lda, b, ldb, c, ldc, add);
  }
  if (left > 0) {
    registers.configure(upper, lower, left);
    columns(rows, vecs, left, left, a + whole, lda, b + whole * ldb, ldb, c, ldc, add || whole > 0);
  }
}

}  // namespace
}  // namespace SPEEDER_ISA
}  // namespace speeder
