// The forward pass of spae_attention: one task is a block of queries of one sequence, for the heads
// that share one key head. Built once for each instruction set.
#include "cpu/attention/prefetch.h"
#include "cpu/attention/softmax.h"
#include "cpu/attention/tasks.h"
#include "cpu/common/tile_packing.h"

namespace speeder {
namespace SPEEDER_ISA {
namespace {

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
  using P = Packed<T>;
  const AttentionArgs& args = call.args;
  const ForwardScratch at(args, scratch);
  P* const packed_q = reinterpret_cast<P*>(at.q);
  P* const packed_k = reinterpret_cast<P*>(at.k);
  P* const packed_v = reinterpret_cast<P*>(at.v);
  P* const weights = reinterpret_cast<P*>(at.weights);
  const int64_t group = args.heads / args.kv_heads, head = task.kv_head * group;
  const int64_t width = padded(args.size), size_vecs = round_up(args.size, kWidth) / kWidth;
  const int64_t q_ld = width / kInLane<P>, depth = lanes_of<P>(args.size);
  const int64_t q0 = args.cu_q[task.sequence] + task.first;
  const int64_t k0 = args.cu_k[task.sequence];
  const int64_t keys = args.cu_k[task.sequence + 1] - k0;
  const int64_t queries = args.cu_q[task.sequence + 1] - args.cu_q[task.sequence];
  const int64_t rows = task.count * group;
  // Query `task.first` sees `reach` keys, each later query one more; without a mask all see all.
  const int64_t reach = args.causal ? keys - queries + task.first + 1 : keys;
  const int64_t step = args.causal ? 1 : 0;
  const int64_t end = smaller(keys, reach + step * (task.count - 1));
  const float factor = args.scale * kLog2E;

  const T* q = static_cast<const T*>(args.q.data) + q0 * args.q.token_stride;
  for (int64_t i = 0; i < task.count; ++i) {
    pack_rows(q + i * args.q.token_stride + head * args.q.head_stride, args.q.head_stride, group,
              args.size, packed_q + i * group * q_ld, q_ld);
  }
  for (int64_t r = 0; r < rows; ++r) {
    at.top[r] = -kInfinity;
    store(at.total + r * kWidth, Vec{});
  }

  KeyBias bias(args, tables);
  const T* k = static_cast<const T*>(args.k.data) + task.kv_head * args.k.head_stride;
  const T* v = static_cast<const T*>(args.v.data) + task.kv_head * args.v.head_stride;
  Prefetch prefetch = prefetch_of<T>(call, next);
  const int64_t block = key_block(args);
  TileRegisters registers;
  for (int64_t first = 0; first < end; first += block) {
    const int64_t count = smaller(block, end - first), ld = padded(count);
    const int64_t weights_ld = ld / kInLane<P>;
    pack_columns(k + (k0 + first) * args.k.token_stride, args.k.token_stride, count, args.size,
                 packed_k, ld);
    pack_depth(v + (k0 + first) * args.v.token_stride, args.v.token_stride, count, args.size,
               packed_v, width);
    bias.prepare(args.rank_k + k0 + first, count);
    for (int64_t r = 0; r < rows; r += kTileRows) {
      const int64_t tile = smaller(kTileRows, rows - r);
      const int64_t most = smaller(count, reach + step * ((r + tile - 1) / group) - first);
      if (most <= 0) continue;
      if (first + block >= end) prefetch.advance((tile + group - 1) / group);
      const int64_t vecs = round_up(most, kWidth) / kWidth;
      product<false>(registers, tile, vecs, depth, packed_q + r * q_ld, q_ld, packed_k, ld,
                     at.scores, ld, false);
      Vec largest[kTileRows];
      int64_t i = r / group, g = r % group;
      for (int64_t n = 0; n < tile; ++n, ++g) {
        if (g == group) {
          g = 0;
          ++i;
        }
        const int64_t seen = clamp(reach + step * i - first, 0, count);
        const int64_t rank = args.rank_q[q0 + i];
        float* scores = at.scores + n * ld;
        largest[n] = bias_scores(scores, seen, vecs, factor, bias, head + g, rank);
      }
      float keep[kTileRows];
      soften(at.scores, ld, tile, vecs, largest, {at.top + r, at.total + r * kWidth}, weights,
             weights_ld, keep);
      float* out = at.out + r * width;
      for (int64_t n = 0; n < tile && first > 0; ++n) {
        if (keep[n] == 1.0f) continue;
        for (int64_t d = 0; d < width; d += kWidth) {
          store(out + n * width + d, load(out + n * width + d) * keep[n]);
        }
      }
      product<false>(registers, tile, size_vecs, lanes_of<P>(most), weights, weights_ld, packed_v,
                     width, out, width, first > 0);
    }
  }

  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = (q0 + r / group) * args.heads + head + r % group;
    write_row(static_cast<T*>(call.out) + row * args.size, call.lse + row, at.out + r * width,
              args.size, at.top[r], sum(load(at.total + r * kWidth)));
  }
}

}  // namespace

#if defined(__AVX512BF16__)
const ForwardKernel kForward[3] = {nullptr, forward<BFloat16>, nullptr};
#else
const ForwardKernel kForward[3] = {forward<float>, forward<BFloat16>, forward<Half>};
#endif

}  // namespace SPEEDER_ISA
}  // namespace speeder
