// How large tiles of products are at most, whatever the instruction set: what scratch memory is
// laid out for (see tile_product.h).
#pragma once

#include <cstdint>

namespace speeder {
namespace {

constexpr int64_t kMaxWidth = 16;      // floats in the widest vector
constexpr int64_t kMostTileRows = 32;  // rows of the tallest tile

}  // namespace
}  // namespace speeder
