// The softmax of one tile of score rows against one block of keys, carried on from block to block
// (online softmax): a running maximum and a running sum a row. All rows of a tile go through each
// step together, so that their chains of dependent instructions overlap. Included once for each
// instruction set.
#pragma once

#include "cpu/attention/bias.h"
#include "cpu/common/tile_product.h"

extern "C" float logf(float);

namespace speeder {
namespace SPEEDER_ISA {
namespace {

struct NoBias {
  Vec operator()(int64_t) const { return Vec{}; }
};

// scores = scores * factor + bias over the first `seen` keys, -inf from there up to `vecs` vectors;
// returns the largest of each lane.
template <typename Bias>
inline Vec bias_scores(float* scores, int64_t seen, int64_t vecs, float factor, const Bias& bias) {
  const int64_t whole = smaller(seen / kWidth, vecs);
  Vec most = splat(-kInfinity);
  for (int64_t v = 0; v < whole; ++v) {
    const Vec score = load(scores + v * kWidth) * factor + bias(v);
    store(scores + v * kWidth, score);
    most = largest(score, most);
  }
  for (int64_t v = whole; v < vecs; ++v) {
    const Ints left = lanes() < static_cast<int32_t>(larger(seen - v * kWidth, 0));
    const Vec score = load(scores + v * kWidth) * factor + bias(v);
    const Vec known = left ? score : splat(-kInfinity);
    store(scores + v * kWidth, known);
    most = largest(known, most);
  }
  return most;
}

// The same for a query of rank `rank`, -1 where it is no item.
inline Vec bias_scores(float* scores, int64_t seen, int64_t vecs, float factor, const KeyBias& bias,
                       int64_t head, int64_t rank) {
  if (rank < 0 || !bias.any()) return bias_scores(scores, seen, vecs, factor, NoBias{});
  const auto with = [&](const auto& row) { return bias_scores(scores, seen, vecs, factor, row); };
  switch (bias.ranks()) {
    case Ranks::kConsecutive: {
      Vec most = splat(-kInfinity);
      for (int64_t v = 0; v < vecs;) {
        const KeyBias::Span span = bias.span(head, rank, v);
        const int64_t count = smaller(span.vecs, vecs - v);
        const int64_t left = larger(seen - v * kWidth, 0);
        most = largest(most, bias_scores(scores + v * kWidth, left, count, factor, span));
        v += count;
      }
      return most;
    }
    case Ranks::kRising:
      return with(KeyBias::Row<Ranks::kRising>(bias, head, rank));
    case Ranks::kAny:
      break;
  }
  return with(KeyBias::Row<Ranks::kAny>(bias, head, rank));
}

inline void store_weights(float* out, int64_t v, Vec x) { store(out + v * kWidth, x); }
inline void store_weights(Pair* out, int64_t v, Vec x) {
  store(reinterpret_cast<BFloat16*>(out) + v * kWidth, x);
}

// The running softmax of up to kTileRows rows.
struct SoftmaxRows {
  float* top;    // (rows,): the largest score so far
  float* total;  // (rows, kWidth): sums of weights so far, a part in each lane
};

// weights = 2^(scores - top) over `vecs` vectors of each of `tile` rows, after top has taken in
// `most`, the rows' largest scores by lane. keep[n] is what row n's earlier sums are to be
// multiplied with.
template <typename P>
inline void soften(const float* scores, int64_t ld, int64_t tile, int64_t vecs, const Vec* most,
                   const SoftmaxRows& rows, P* weights, int64_t weights_ld, float* keep) {
  constexpr int kRounded = (kTileRows + kWidth - 1) / kWidth * kWidth;
  float before[kRounded] = {}, now[kRounded] = {}, kept[kRounded];
  for (int64_t n = 0; n < tile; ++n) {
    before[n] = rows.top[n];
    const float largest_now = largest(most[n]);
    now[n] = largest_now > before[n] ? largest_now : before[n];
    rows.top[n] = now[n];
    if (now[n] == -kInfinity) now[n] = 0.0f;  // all are -inf: weights 0, not NaN
  }
  for (int n = 0; n < kRounded; n += kWidth)
    store(kept + n, exp2(load(before + n) - load(now + n)));
  for (int64_t n = 0; n < tile; ++n) {
    keep[n] = kept[n];
    Vec total = load(rows.total + n * kWidth) * kept[n];
    for (int64_t v = 0; v < vecs; ++v) {
      const Vec weight = exp2(load(scores + n * ld + v * kWidth) - now[n]);
      store_weights(weights + n * weights_ld, v, weight);
      total += weight;
    }
    store(rows.total + n * kWidth, total);
  }
}

// A finished row: the sum of weights times values, divided by the sum of weights, and the natural
// log-sum-exp of the row's scores. A row that sees no key, or none with any weight, is zero.
template <typename T>
inline void write_row(T* out, float* lse, const float* sums, int64_t size, float top, float total) {
  if (total == 0.0f) {
    for (int64_t d = 0; d < size; ++d) out[d] = from_float<T>(0.0f);
    *lse = kInfinity;
  } else {
    store_row(out, sums, size, 1.0f / total);
    *lse = top * kLn2 + logf(total);
  }
}

}  // namespace
}  // namespace SPEEDER_ISA
}  // namespace speeder
