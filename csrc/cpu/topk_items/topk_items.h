// topk_items on a CPU: plain functions over raw pointers, no torch header. For each hidden row the
// k items with the highest dot product; equal scores in the order of the items. A tile of scores is
// compared with each row's k-th best so far and forgotten; no (rows, items) matrix is ever held.
#pragma once

#include <cstdint>

#include "cpu/common/parallel.h"
#include "dtype.h"

namespace speeder {

struct TopkArgs {
  const void* hidden;  // (rows, size), dense
  const void* table;   // (items, size), dense
  // Row n never gets exclude_items[exclude_indptr[n] .. exclude_indptr[n + 1] - 1]; null: all may
  // have all.
  const int64_t* exclude_indptr;  // (rows + 1,)
  const int64_t* exclude_items;
  float* scores;  // (rows, k), falling; -inf where a row has fewer than k items
  int64_t* best;  // (rows, k): items; -1 there
  int64_t rows;
  int64_t items;
  int64_t size;
  int64_t k;
};

void topk_items(const TopkArgs& args, DType dtype, int64_t threads,
                const ParallelFor& parallel_for);

}  // namespace speeder
