// The small kernels of the backward pass: out . grad of every row before it, and after it what
// makes tables out of the keys' sums, in a fixed order (sum_parts.cuh adds them up).
#pragma once

#include "cuda/attention/tile.cuh"

namespace speeder {
namespace cuda {

// A warp has one row of (tokens_q, heads).
template <typename T>
struct SpaeDelta {
  static constexpr int kThreads = 256, kMinBlocks = 1;

  AttentionBackward call;
  float* delta;
  int64_t tokens;

  SPEEDER_DEVICE void operator()() const {
    const AttentionArgs& args = call.args;
    const int64_t row = block_index_x() * int64_t{kThreads / kWarp} + warp();
    if (row >= tokens * args.heads) return;
    const T* out = static_cast<const T*>(call.out) + row * args.size;
    const T* grad = rows_of<T>(call.grad, row / args.heads, row % args.heads)(0);
    float sum = 0.0f;
    for (int d = lane(); d < args.size; d += kWarp) sum += to_float(out[d]) * to_float(grad[d]);
    sum = warp_sum(sum);
    if (lane() == 0) delta[row] = sum;
  }
};

// The absolute table's gradient from the keys' sums: a warp has a share of the keys and one head,
// and a table of its own.
struct SpaeAbsoluteSums {
  static constexpr int kThreads = 32, kMinBlocks = 1;

  const float* key_sums;  // (heads, tokens)
  const int32_t* ranks;   // (tokens,)
  const int32_t* end;     // one: the keys behind the last sequence have no sums
  float* tables;          // (shares, heads, positions)
  int64_t tokens, heads, positions, shares;

  SPEEDER_DEVICE void operator()() const {
    const int64_t head = block_index_x() % heads, share = block_index_x() / heads;
    float* table = tables + (share * heads + head) * positions;
    for (int64_t p = lane(); p < positions; p += kWarp) table[p] = 0.0f;
    const int64_t last = clamp(*end, 0, tokens * (share + 1) / shares);
    for (int64_t t = tokens * share / shares; t < last; t += kWarp) {
      sync_warp();  // the table is as the last keys left it, for every lane
      const int64_t key = t + lane();
      const int rank = key < last ? ranks[key] : -1;
      const int place = rank < 0 ? -1 : static_cast<int>(clamp(rank, 0, positions - 1));
      const float value = rank < 0 ? 0.0f : key_sums[head * tokens + key];
      // The first of the lanes that share a place adds for all of them, in order.
      bool first = place >= 0;
      float sum = 0.0f;
      for (int source = 0; source < kWarp; ++source) {
        const int other = shuffle(place, source);
        const float more = shuffle(value, source);
        if (other != place) continue;
        sum += more;
        if (source < lane()) first = false;
      }
      if (first) table[place] += sum;
    }
  }
};

}  // namespace cuda
}  // namespace speeder
