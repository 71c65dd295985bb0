// pack_tokens on a CPU: plain functions over raw pointers, no torch header.
//
//   out[t] = item_tokens[item_rows[t]] (+ position_prompts[ranks[t]])  where item_rows[t] >= 0
//   out[t] = text_embedding[input_ids[t]]                              elsewhere
//
// and the sum that its gradients are: out[r] = sum of grad[order[n]] over starts[r] <= n <
// starts[r + 1]. Every output element is summed by one thread, in the order of `order`, so the
// result does not depend on the number of threads.
#pragma once

#include <cstdint>

#include "cpu/common/parallel.h"
#include "dtype.h"

namespace speeder {

struct PackArgs {
  const int64_t* input_ids;  // (tokens,)
  const int64_t* item_rows;  // (tokens,)
  const int64_t* ranks;      // (tokens,)
  const void* text_embedding;
  const void* item_tokens;
  const void* position_prompts;
  void* out;  // (tokens, hidden)
  int64_t tokens;
  int64_t hidden;
};

struct SumArgs {
  const void* grad;       // (tokens, hidden)
  const int64_t* order;   // token indices, grouped by row
  const int64_t* starts;  // (rows + 1,): where each row's tokens start in `order`
  void* out;              // (rows, hidden)
  int64_t rows;
  int64_t hidden;
};

// Whether every id, row and rank that is read lies in its table; the tables' rows are given.
bool pack_values_fit(const PackArgs& args, int64_t vocabulary, int64_t items, int64_t prompts);

void pack_tokens(const PackArgs& args, DType dtype, const ParallelFor& parallel_for);
void sum_rows(const SumArgs& args, DType dtype, const ParallelFor& parallel_for);

}  // namespace speeder
