// spae_attention on a CPU: plain functions over raw pointers, no torch header.
//
//   score[h,i,j] = scale * q_i.k_j + [rank_q_i >= 0 and rank_k_j >= 0] *
//                  (relative[h, clamp(rank_q_i - rank_k_j, 0, R-1)] +
//                   absolute[h, clamp(rank_k_j, 0, A-1)])
//
// over packed sequences, softmax over the keys that query i sees, times v. The formula is this
// project's own reading of "relative and absolute position". Scores are never held beyond a block
// of them: the method of flash attention. Arithmetic is in float32. The work is dealt to the
// threads in a fixed way and sums are taken in a fixed order, so results are the same to the last
// bit from run to run with one number of threads.
#pragma once

#include <cstdint>

#include "cpu/common/parallel.h"
#include "dtype.h"

namespace speeder {

// A (tokens, heads, size) tensor whose last dimension is contiguous; strides in elements.
struct TokenView {
  const void* data;
  int64_t token_stride;
  int64_t head_stride;
};

struct AttentionArgs {
  TokenView q, k, v;
  const int32_t* cu_q;    // (sequences + 1,)
  const int32_t* cu_k;    // (sequences + 1,)
  const int32_t* rank_q;  // (tokens_q,)
  const int32_t* rank_k;  // (tokens_k,)
  const float* relative;  // (heads, buckets), or null
  const float* absolute;  // (heads, positions), or null
  int64_t sequences;
  int64_t heads;
  int64_t kv_heads;
  int64_t size;       // of a head
  int64_t buckets;    // R
  int64_t positions;  // A
  float scale;
  bool causal;
};

struct AttentionForward {
  AttentionArgs args;
  void* out;   // (tokens_q, heads, size)
  float* lse;  // (tokens_q, heads): natural log-sum-exp of the scores; +inf where no key is seen
};

// A gradient that is not asked for is null, and costs nothing.
struct AttentionBackward {
  AttentionArgs args;
  TokenView grad;        // of out
  const void* out;       // (tokens_q, heads, size), as the forward gave it
  const float* lse;      // as the forward gave it
  void* grad_q;          // (tokens_q, heads, size)
  void* grad_k;          // (tokens_k, kv_heads, size)
  void* grad_v;          // (tokens_k, kv_heads, size)
  float* grad_relative;  // (heads, buckets)
  float* grad_absolute;  // (heads, positions)
};

void spae_attention(const AttentionForward& call, DType dtype, int64_t threads,
                    const ParallelFor& parallel_for);
void spae_attention_backward(const AttentionBackward& call, DType dtype, int64_t threads,
                             const ParallelFor& parallel_for);

}  // namespace speeder
