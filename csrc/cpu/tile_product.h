// Products of small matrices that lie in a cache, packed as packed_lanes.h and tile_packing.h have
// it: `product`, for up to kTileRows rows at a time, best with kTileVecs vectors of columns.
#pragma once

#if defined(__AMX_BF16__)
#include "cpu/amx_product.h"
#else
#include "cpu/register_product.h"
#endif
