// What passes between item_cross_entropy.cpp, which shares the work out, and the loops that are
// built once for each instruction set.
#pragma once

#include <cstdint>

#include "cpu/common/item_groups.h"
#include "cpu/common/turns.h"
#include "cpu/item_cross_entropy/item_cross_entropy.h"

namespace speeder {

// Hidden rows in the layouts that register tiles read, made once a call. Groups of kGroupRows rows
// lie one after another, each cut into strips as wide as a tile (see tiles.cpp).
struct PackedHidden {
  float* columns;  // (groups, group_floats): right operands whose depth lies along a row
  float* depth;    // the same size: right operands whose depth goes down the rows; or null
};

// A task of the backward pass: a block of at most kBackwardItems items.
struct ItemLossTask {
  int64_t first, count;
  // Where the gradient of hidden is summed, (rows, padded size), by several tasks, group of rows by
  // group; null where not asked for.
  float* grad_hidden;
  // Groups that the task which adds to the same sum before this one has not been through; null:
  // this is the first, and sets the sum.
  const int64_t* before;
  int64_t* left;  // the same of this task
};

struct ItemLossKernels {
  // Packs group `group` of hidden.
  void (*pack)(const ItemLossArgs& args, const PackedHidden& packed, int64_t group);
  // Items first .. first + count - 1 for the rows of one group: the largest logit of each row and
  // the sum of 2^(logit - largest), in units of log2; (kGroupRows,) each.
  void (*forward)(const ItemLossArgs& args, const PackedHidden& packed, int64_t group,
                  int64_t first, int64_t count, float* top, float* total, float* scratch);
  // Natural logits of the targets of rows begin .. end - 1.
  void (*target_logits)(const ItemLossArgs& args, int64_t begin, int64_t end, float* logits);
  void (*backward)(const ItemLossBackward& call, const PackedHidden& packed,
                   const ItemLossTask& task, float* scratch);
};

namespace portable {
extern const ItemLossKernels kItemLoss[3];  // indexed by DType
}
namespace avx2 {
extern const ItemLossKernels kItemLoss[3];
}
namespace avx512 {
extern const ItemLossKernels kItemLoss[3];
}
namespace avx512_bf16 {
extern const ItemLossKernels kItemLoss[3];  // for bfloat16 alone
}
namespace avx512_amx {
extern const ItemLossKernels kItemLoss[3];  // for bfloat16 alone
}

namespace {

constexpr int64_t kForwardItems = 96;    // items whose rows are packed at once
constexpr int64_t kBackwardItems = 192;  // items whose gradients are summed at once

// Where one thread's scratch memory goes; with a null base it only measures.
struct ItemLossScratch {
  ItemLossScratch(int64_t size, bool backward, float* base) {
    const int64_t width = padded_size(size);
    const int64_t block = backward ? kBackwardItems : kForwardItems;
    items = take(base, block * width);
    scores = take(base, kMostTileRows * kWidestStrip);
    if (!backward) return;
    items_depth = take(base, block * width);
    grads = take(base, block * kGroupRows);
    grads_depth = take(base, block * kGroupRows);
    grad_items = take(base, block * width);
  }

  float* items;        // (items, width): rows of the table, left operands
  float* scores;       // (tile rows, strip)
  float* items_depth;  // strips of (items, strip): right operands
  float* grads;        // (items, kGroupRows): the logits' gradient
  float* grads_depth;  // where lanes hold pairs, the same in pairs of items: (items / 2,
                       // kGroupRows), on AMX turned
  float* grad_items;   // (items, width): sums
  int64_t floats = 0;

 private:
  float* take(float* base, int64_t count) {
    float* at = base == nullptr ? nullptr : base + floats;
    floats += count;
    return at;
  }
};

}  // namespace
}  // namespace speeder
