// What passes between topk_items.cpp, which keeps the candidates, and the loops over scores, which
// are built once for each instruction set.
#pragma once

#include <cstdint>

#include "cpu/common/item_groups.h"
#include "cpu/topk_items/topk_items.h"

namespace speeder {

// Where a score goes that may be among its row's best: `row` counts within the group. It may raise
// thresholds[row].
struct CandidateSink {
  void (*push)(void* state, int64_t row, int64_t item, float score);
  void* state;
  // (kGroupRows,): scores that are not above are not wanted. NaN: all are.
  float* thresholds;
};

struct TopkKernels {
  // Packs hidden rows of group `group` into `columns`, of group_floats floats, as `score` reads
  // them.
  void (*pack)(const TopkArgs& args, int64_t group, float* columns);
  // Scores items first .. first + count - 1 for the rows of one group.
  void (*score)(const TopkArgs& args, int64_t group, const float* columns, int64_t first,
                int64_t count, const CandidateSink& sink, float* scratch);
};

namespace portable {
extern const TopkKernels kTopk[3];  // indexed by DType
}
namespace avx2 {
extern const TopkKernels kTopk[3];
}
namespace avx512 {
extern const TopkKernels kTopk[3];
}
namespace avx512_bf16 {
extern const TopkKernels kTopk[3];  // for bfloat16 alone
}
namespace avx512_amx {
extern const TopkKernels kTopk[3];  // for bfloat16 alone
}

namespace {

// A packed tile of items and a tile of scores.
inline int64_t topk_scratch_floats(int64_t size) {
  return kMostTileRows * (padded_size(size) + kWidestStrip);
}

}  // namespace
}  // namespace speeder
