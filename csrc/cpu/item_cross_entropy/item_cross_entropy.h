// item_cross_entropy on a CPU: plain functions over raw pointers, no torch header.
//
//   logit[n,i] = scale * hidden[n].table[i] - log_q[i]
//   loss[n]    = logsumexp_i(logit[n,i]) - logit[n, targets[n]]
//
// A block of logits is computed, used and forgotten, in the backward pass once more from the saved
// log-sum-exp; no (rows, items) matrix is ever held. Sums are float32 and taken in a fixed order.
#pragma once

#include <cstdint>

#include "cpu/common/parallel.h"
#include "dtype.h"

namespace speeder {

struct ItemLossArgs {
  const void* hidden;      // (rows, size), dense
  const void* table;       // (items, size), dense
  const int64_t* targets;  // (rows,)
  const float* log_q;      // (items,), or null
  int64_t rows;
  int64_t items;
  int64_t size;
  float scale;
};

struct ItemLossForward {
  ItemLossArgs args;
  float* loss;  // (rows,)
  float* lse;   // (rows,): natural log-sum-exp of the logits
};

// A gradient that is not asked for is null, and costs nothing.
struct ItemLossBackward {
  ItemLossArgs args;
  const float* grad;  // (rows,): of loss
  const float* lse;   // as the forward gave it
  void* grad_hidden;  // (rows, size)
  void* grad_table;   // (items, size)
};

void item_cross_entropy(const ItemLossForward& call, DType dtype, int64_t threads,
                        const ParallelFor& parallel_for);
void item_cross_entropy_backward(const ItemLossBackward& call, DType dtype, int64_t threads,
                                 const ParallelFor& parallel_for);

}  // namespace speeder
