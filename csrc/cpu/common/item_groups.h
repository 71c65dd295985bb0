// How item_cross_entropy and topk_items cut up their hidden rows and size their memory, the same
// for every instruction set.
#pragma once

#include <cstdint>

#include "cpu/common/tile_limits.h"

namespace speeder {
namespace {

constexpr int64_t kGroupRows = 256;   // hidden rows of a group
constexpr int64_t kWidestStrip = 64;  // columns of the widest tile

inline int64_t groups_of(int64_t rows) { return (rows + kGroupRows - 1) / kGroupRows; }
inline int64_t padded_size(int64_t size) {
  return (size + kWidestStrip - 1) / kWidestStrip * kWidestStrip;
}

// Floats of a packed group.
inline int64_t group_floats(int64_t size) { return kGroupRows * padded_size(size); }

}  // namespace
}  // namespace speeder
