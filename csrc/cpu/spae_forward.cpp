// The forward pass of spae_attention: one task is a block of queries of one sequence, for the heads
// that share one key head. Built once for each instruction set.
#include "cpu/spae_bias.h"
#include "cpu/spae_few_rows.h"
#include "cpu/spae_prefetch.h"
#include "cpu/spae_tasks.h"
#include "cpu/tile_product.h"

extern "C" float logf(float);

namespace speeder {
namespace SPEEDER_ISA {
namespace {

// Turns one row of scores into weights 2^(score - top) over its first `seen` keys, and zero up to
// `vecs` vectors. `top` and `total` are the row's largest score and sum of weights over the blocks
// so far; returns what the row's earlier sums are to be multiplied with. `bias(v)` is added.
template <typename Bias>
inline float soften(float* scores, int64_t seen, int64_t vecs, const Bias& bias, float* top,
                    float* total) {
  const int64_t whole = seen / kWidth;
  Vec most = splat(-kInfinity);
  for (int64_t v = 0; v < whole; ++v) {
    const Vec score = load(scores + v * kWidth) + bias(v);
    store(scores + v * kWidth, score);
    most = largest(score, most);
  }
  const int64_t used = (seen + kWidth - 1) / kWidth;
  if (used > whole) {
    const Ints left = lanes() < static_cast<int32_t>(seen - whole * kWidth);
    const Vec score = left ? load(scores + whole * kWidth) + bias(whole) : splat(-kInfinity);
    store(scores + whole * kWidth, score);
    most = largest(score, most);
  }
  const float now = largest(most), before = *top;
  const float now_top = now > before ? now : before;
  const float shift = now_top == -kInfinity ? 0.0f : now_top;  // all are -inf: weights 0, not NaN
  Vec weights = {};
  for (int64_t v = 0; v < used; ++v) {
    const Vec weight = exp2(load(scores + v * kWidth) - shift);
    store(scores + v * kWidth, weight);
    weights += weight;
  }
  for (int64_t v = used; v < vecs; ++v) store(scores + v * kWidth, Vec{});
  const float keep = before == now_top ? 1.0f : exp2(splat(before - shift))[0];
  *top = now_top;
  *total = *total * keep + sum(weights);
  return keep;
}

struct NoBias {
  Vec operator()(int64_t) const { return Vec{}; }
};

template <typename T>
Prefetch prefetch_of(const AttentionForward& call, const ForwardTask* task) {
  Prefetch prefetch;
  if (task == nullptr) return prefetch;
  const AttentionArgs& args = call.args;
  const int64_t q = args.cu_q[task->sequence] + task->first, k = args.cu_k[task->sequence];
  const int64_t keys = args.cu_k[task->sequence + 1] - k;
  const int64_t group = args.heads / args.kv_heads, head = task->kv_head * group;
  const TokenView out{call.out, args.heads * args.size, args.size};
  prefetch.add<T>(args.q, q, task->count, head, group, args.size);
  prefetch.add<T>(out, q, task->count, head, group, args.size);
  prefetch.add<T>(args.k, k, keys, task->kv_head, 1, args.size);
  prefetch.add<T>(args.v, k, keys, task->kv_head, 1, args.size);
  return prefetch;
}

template <typename T>
void forward(const AttentionForward& call, const BiasTables& tables, const ForwardTask& task,
             const ForwardTask* next, float* scratch) {
  const AttentionArgs& args = call.args;
  const ForwardScratch at(args, scratch);
  const int64_t group = args.heads / args.kv_heads, head = task.kv_head * group;
  const int64_t width = padded(args.size), value_vecs = round_up(args.size, kWidth) / kWidth;
  const int64_t q0 = args.cu_q[task.sequence] + task.first;
  const int64_t k0 = args.cu_k[task.sequence];
  const int64_t keys = args.cu_k[task.sequence + 1] - k0;
  const int64_t queries = args.cu_q[task.sequence + 1] - args.cu_q[task.sequence];
  const int64_t rows = task.count * group;
  // Query `task.first` sees `reach` keys, each later query one more; without a mask all see all.
  const int64_t reach = args.causal ? keys - queries + task.first + 1 : keys;
  const int64_t step = args.causal ? 1 : 0;
  const int64_t end = smaller(keys, reach + step * (task.count - 1));

  const T* q = static_cast<const T*>(args.q.data) + q0 * args.q.token_stride;
  for (int64_t i = 0; i < task.count; ++i) {
    pack_rows(q + i * args.q.token_stride + head * args.q.head_stride, args.q.head_stride, group,
              args.size, args.scale * kLog2E, at.q + i * group * width, width);
  }
  for (int64_t r = 0; r < rows; ++r) {
    at.top[r] = -kInfinity;
    at.total[r] = 0.0f;
  }

  KeyBias bias(args, tables, task.kv_head, at.absolute);
  const T* k = static_cast<const T*>(args.k.data) + task.kv_head * args.k.head_stride;
  const T* v = static_cast<const T*>(args.v.data) + task.kv_head * args.v.head_stride;
  // So few rows that a key is used hardly more often than packing would touch it.
  const bool direct = rows <= kTileRows && args.size % kWidth == 0;
  Prefetch prefetch = prefetch_of<T>(call, next);
  const int64_t block = key_block(args);
  for (int64_t first = 0; first < end; first += block) {
    const int64_t count = smaller(block, end - first), ld = padded(count);
    const T* block_k = k + (k0 + first) * args.k.token_stride;
    const T* block_v = v + (k0 + first) * args.v.token_stride;
    if (!direct) {
      pack_transposed(block_k, args.k.token_stride, count, args.size, at.k, ld);
      pack_rows(block_v, args.v.token_stride, count, args.size, 1.0f, at.v, width);
    }
    bias.prepare(args.rank_k + k0 + first, count);
    for (int64_t r = 0; r < rows; r += kTileRows) {
      const int64_t tile = smaller(kTileRows, rows - r);
      const int64_t most = smaller(count, reach + step * ((r + tile - 1) / group) - first);
      if (most <= 0) continue;
      if (!direct && first + block >= end) prefetch.advance((tile + group - 1) / group);
      const int64_t vecs = round_up(most, kWidth) / kWidth;
      float* out = at.out + r * width;
      if (direct) {
        direct_scores_of<T>(rows)(at.q, width, block_k, args.k.token_stride, block_v,
                                  args.v.token_stride, most, end - first, args.size, at.scores, ld);
      } else {
        product<false>(tile, vecs, args.size, at.q + r * width, width, at.k, ld, at.scores, ld,
                       false);
      }
      int64_t i = r / group, g = r % group;
      for (int64_t n = 0; n < tile; ++n, ++g) {
        if (g == group) {
          g = 0;
          ++i;
        }
        const int64_t seen = clamp(reach + step * i - first, 0, count);
        const int64_t rank = args.rank_q[q0 + i];
        float *scores = at.scores + n * ld, *top = at.top + r + n, *total = at.total + r + n;
        const float keep = rank >= 0 && bias.any()
                               ? soften(scores, seen, vecs, KeyBias::Row(bias, g, rank), top, total)
                               : soften(scores, seen, vecs, NoBias{}, top, total);
        if (first == 0 || keep == 1.0f) continue;
        for (int64_t d = 0; d < width; d += kWidth) {
          store(out + n * width + d, load(out + n * width + d) * keep);
        }
      }
      if (direct) {
        product<false>(tile, value_vecs, most, at.scores, ld, block_v, args.v.token_stride, out,
                       width, first > 0);
      } else {
        product<false>(tile, value_vecs, most, at.scores, ld, at.v, width, out, width, first > 0);
      }
    }
  }

  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = (q0 + r / group) * args.heads + head + r % group;
    T* out = static_cast<T*>(call.out) + row * args.size;
    const float total = at.total[r];
    if (total == 0.0f) {  // no key is seen, or none has any weight
      for (int64_t d = 0; d < args.size; ++d) out[d] = from_float<T>(0.0f);
      call.lse[row] = kInfinity;
    } else {
      store_row(out, at.out + r * width, args.size, 1.0f / total);
      call.lse[row] = at.top[r] * kLn2 + logf(total);
    }
  }
}

}  // namespace

const ForwardKernel kForward[3] = {forward<float>, forward<BFloat16>, forward<Half>};

}  // namespace SPEEDER_ISA
}  // namespace speeder
