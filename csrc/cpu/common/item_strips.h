// Hidden rows and items as tiles of scores read them: a tile is a few items times a strip of hidden
// rows, so that a row's scores of all items lie in one lane. A strip is as many columns as a
// register tile has, and lies contiguous, so that it is read from the second cache in order.
// Included once for each instruction set.
#pragma once

#include "cpu/common/item_groups.h"
#include "cpu/common/tile_packing.h"
#include "cpu/common/tile_product.h"

namespace speeder {
namespace SPEEDER_ISA {
namespace {

constexpr int64_t kStrip = kTileVecs * kWidth;
static_assert(kStrip <= kWidestStrip, "scratch fits every tile");

inline int64_t strips_of(int64_t count) { return (count + kStrip - 1) / kStrip; }

// Vectors of a strip that begins with `columns` columns left.
inline int64_t vecs_of(int64_t columns) {
  return smaller(kTileVecs, (columns + kWidth - 1) / kWidth);
}

// Strip `n` of one group or block, whose strips are `lanes` x kStrip each.
template <typename P>
inline P* strip(P* first, int64_t lanes, int64_t n) {
  return first + n * lanes * kStrip;
}

// rows x size elements as right operands whose depth lies along the rows, strip by strip of rows.
template <typename T, typename P>
inline void pack_column_strips(const T* in, int64_t rows, int64_t size, P* out) {
  const int64_t lanes = padded_size(size) / kInLane<P>;
  for (int64_t n = 0; n < strips_of(rows); ++n) {
    const int64_t r = n * kStrip;
    pack_columns(in + r * size, size, smaller(kStrip, rows - r), size, strip(out, lanes, n),
                 kStrip);
  }
}

// The same as right operands whose depth goes down the rows, strip by strip of elements.
template <typename T, typename P>
inline void pack_depth_strips(const T* in, int64_t rows, int64_t size, P* out) {
  for (int64_t n = 0; n < strips_of(size); ++n) {
    const int64_t d = n * kStrip;
    pack_depth(in + d, size, rows, smaller(kStrip, size - d), strip(out, lanes_of<P>(rows), n),
               kStrip);
  }
}

}  // namespace
}  // namespace SPEEDER_ISA
}  // namespace speeder
