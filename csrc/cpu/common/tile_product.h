// Products of small matrices that lie in a cache, packed as packed_lanes.h and tile_packing.h have
// it: `product`, for up to kTileRows rows at a time, best with kTileVecs vectors of columns.
#pragma once

#include "cpu/common/tile_limits.h"

#if defined(__AMX_BF16__)
#include "cpu/common/amx_product.h"
#else

#include "cpu/common/register_product.h"

namespace speeder {
namespace SPEEDER_ISA {
namespace {

constexpr int kTileRows = kRegisterRows;
static_assert(kTileRows <= kMostTileRows, "scratch fits every tile");

// What a thread must hold to multiply by AMX; vector registers need nothing.
struct TileRegisters {};

template <bool kTransposed, typename A, typename B>
inline void product(TileRegisters&, int64_t rows, int64_t vecs, int64_t depth, const A* a,
                    int64_t lda, const B* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  register_product<kTransposed>(rows, vecs, depth, a, lda, b, ldb, c, ldc, add);
}

}  // namespace
}  // namespace SPEEDER_ISA
}  // namespace speeder

#endif
