// The gradients of keys and values: a block has the keys of one tile and key head, and goes over
// the queries that see them, of one head of the group after the other. Scores are computed turned
// round, with keys as rows, so that the weights are at once what the second products read.
#pragma once

#include "cuda/attention/forward.cuh"

namespace speeder {
namespace cuda {

// kGradK, kGradV: which of the two sums a pass has registers for. The first also gives the key
// sums, of which the absolute table's gradient is made.
template <typename T, int kSize, typename Shape, bool kGradK, bool kGradV>
struct GradKVPass {
  using Bias = TileBias<Shape, true>;
  static constexpr int kThreads = Shape::kThreads, kMinBlocks = Shape::kMinBlocks;
  static constexpr int kRows = Shape::kRows, kColumns = Shape::kColumns;
  static_assert(Shape::kRowTiles == 1, "registers are scarce");

  struct Memory {
    static constexpr int kTile = kColumns * kStride<T, kSize>;

    SPEEDER_HOST_DEVICE constexpr Memory()
        : k(layout.take<T>(kRows * kStride<T, kSize>)),
          v(layout.take<T>(kRows * kStride<T, kSize>)),
          q(layout.take<T>(2 * kTile)),
          grad(layout.take<T>(2 * kTile)),
          lse(layout.take<float>(2 * kColumns)),
          delta(layout.take<float>(2 * kColumns)),
          bias(layout) {}
    SharedLayout layout;
    Shared<T> k, v, q, grad;
    Shared<float> lse, delta;
    typename Bias::Memory bias;
  };

  AttentionBackward call;
  const float* delta;  // (tokens_q, heads)
  float* key_sums;     // (heads, tokens_k), or null
  int64_t tokens_k;
  int tiles;        // of the longest sequence
  bool vectorized;  // see load_rows

  SPEEDER_DEVICE void operator()() const {
    const AttentionArgs& args = call.args;
    const int kv_heads = static_cast<int>(args.kv_heads), size = static_cast<int>(args.size);
    const int group = static_cast<int>(args.heads) / kv_heads;
    const int kv_head = block_index_x() % kv_heads, rest = block_index_x() / kv_heads;
    fill_tails();
    if (rest >= args.sequences * tiles) return;
    const int tile_first = rest % tiles * kRows;  // the first keys are seen by most queries
    const Span span(args, rest / tiles);
    if (tile_first >= span.keys) return;
    const int rows = smaller(kRows, span.keys - tile_first), first = warp() * 16;
    const int token = span.k0 + tile_first;
    const Memory memory;
    Bias bias(args, memory.bias, token, rows, span.q0, span.queries);
    load_rows<T, kRows, kSize, kThreads>(memory.k, thread_index(), rows, size, vectorized,
                                         rows_of<T>(args.k, token, kv_head));
    load_rows<T, kRows, kSize, kThreads>(memory.v, thread_index(), rows, size, vectorized,
                                         rows_of<T>(args.v, token, kv_head));

    // The first query that sees a key, and the tiles from there on, for every head of the group.
    const int sees = args.causal ? larger(tile_first - (span.keys - span.queries), 0) : 0;
    const int tile0 = smaller(sees, span.queries) / kColumns;
    const int per_head = (span.queries + kColumns - 1) / kColumns - tile0;
    const int steps = per_head * group;
    if (steps > 0) {
      bias.prefetch(tile0 * kColumns);
      start_tile(memory, bias, span, kv_head * group, tile0, 0, tile0);
    }
    commit_copies();

    constexpr int kSums = kSize / 8;
    SumTile grad_k[1][kGradK ? kSums : 1], grad_v[1][kGradV ? kSums : 1];
    float sums[2] = {}, row_absolute[1][2] = {};
    int head = kv_head * group, tile = tile0;
    for (int n = 0; n < steps; ++n) {
      wait_copies<0>();
      sync_block();
      bias.advance();
      const bool last = tile - tile0 + 1 == per_head;  // of this head
      if (n + 1 < steps) {
        const int next = last ? tile0 : tile + 1;
        start_tile(memory, bias, span, last ? head + 1 : head, next, (n + 1) % 2, tile0);
      }
      commit_copies();
      if (tile == tile0) {
        SPEEDER_UNROLL
        for (int half = 0; half < 2; ++half) {
          row_absolute[0][half] = bias.row_absolute(first + SumTile::row(2 * half), head);
        }
      }
      if (first < rows) {
        SumTile weights[1][kColumns / 8];
        find_weights(weights, memory, bias, span, head, tile_first + first, first, tile, n % 2,
                     row_absolute);
        const Shared<T> q = memory.q.part(n % 2 * Memory::kTile, Memory::kTile);
        const Shared<T> grad = memory.grad.part(n % 2 * Memory::kTile, Memory::kTile);
        if constexpr (kGradV) {
          if (call.grad_v != nullptr) add_weighted<T, 1, kColumns, kSize>(grad_v, weights, grad);
        }
        if constexpr (kGradK) {
          if (call.grad_k != nullptr || key_sums != nullptr) {
            find_grads(weights, memory, bias, grad, first, n % 2, sums);
          }
          if (call.grad_k != nullptr) add_weighted<T, 1, kColumns, kSize>(grad_k, weights, q);
        }
      }
      if (last) {
        if (kGradK && key_sums != nullptr) keep_key_sums(sums, bias, head, token, first, rows);
        ++head;
      }
      tile = last ? tile0 : tile + 1;
    }
    if (kGradK && steps == 0 && key_sums != nullptr) {
      for (int h = 0; h < group; ++h) {
        keep_key_sums(sums, bias, kv_head * group + h, token, first, rows);
      }
    }
    wait_copies<0>();
    sync_block();
    const int64_t at = (int64_t{token} * kv_heads + kv_head) * args.size,
                  stride = kv_heads * args.size;
    if constexpr (kGradK) store(call.grad_k, memory.k, grad_k, args.scale, at, stride, first, rows);
    if constexpr (kGradV) store(call.grad_v, memory.v, grad_v, 1.0f, at, stride, first, rows);
  }

 private:
  // Nothing sees the keys behind the last sequence.
  SPEEDER_DEVICE void fill_tails() const {
    const AttentionArgs& args = call.args;
    const int64_t first = args.cu_k[args.sequences], width = args.kv_heads * args.size;
    if (kGradK && call.grad_k != nullptr) fill_tail<T>(call.grad_k, first, tokens_k, width, 0.0f);
    if (kGradV && call.grad_v != nullptr) fill_tail<T>(call.grad_v, first, tokens_k, width, 0.0f);
  }

  SPEEDER_DEVICE void start_tile(const Memory& memory, Bias& bias, const Span& span, int head,
                                 int n, int stage, int tile0) const {
    const AttentionArgs& args = call.args;
    const int column = n * kColumns, count = span.queries - column;
    const int size = static_cast<int>(args.size);
    const int64_t token = span.q0 + column;
    load_rows<T, kColumns, kSize, kThreads>(memory.q.part(stage * Memory::kTile, Memory::kTile),
                                            thread_index(), count, size, vectorized,
                                            rows_of<T>(args.q, token, head));
    load_rows<T, kColumns, kSize, kThreads>(memory.grad.part(stage * Memory::kTile, Memory::kTile),
                                            thread_index(), count, size, vectorized,
                                            rows_of<T>(call.grad, token, head));
    if (thread_index() < kColumns) {
      const int to = stage * kColumns + thread_index();
      const int64_t at = (token + thread_index()) * args.heads + head;
      copy_async4(memory.lse, to, call.lse + at, thread_index() < count);
      copy_async4(memory.delta, to, delta + at, thread_index() < count);
    }
    bias.stage(column, head, stage);
    bias.prefetch(column + kColumns < span.queries ? column + kColumns : tile0 * kColumns);
  }

  // The weight that each query gave to each of the warp's keys, the first of which is `key`.
  SPEEDER_DEVICE void find_weights(SumTile (&weights)[1][kColumns / 8], const Memory& memory,
                                   const Bias& bias, const Span& span, int head, int key, int first,
                                   int tile, int stage, const float (&row_absolute)[1][2]) const {
    const AttentionArgs& args = call.args;
    const int column = tile * kColumns;
    dot_products<T, 1, kColumns, kSize>(weights, memory.k, first,
                                        memory.q.part(stage * Memory::kTile, Memory::kTile));
    bias.add(weights, first, head, stage, row_absolute);
    // A key is seen by the queries from `from` on; the key after it by one query less.
    const int from = args.causal ? key + SumTile::row(0) - (span.keys - span.queries) : 0;
    const int low = from - column - SumTile::column(0);
    const int high = span.queries - column - SumTile::column(0);
    if (from + 15 > column || column + kColumns > span.queries) {
      const int step = args.causal ? 8 : 0;
      SPEEDER_UNROLL
      for (int n = 0; n < kColumns / 8; ++n) {
        SPEEDER_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int c = 8 * n + i % 2;
          const bool seen = c >= low + i / 2 * step && c < high;
          weights[0][n].at[i] = seen ? weights[0][n].at[i] : -infinity();
        }
      }
    }
    SPEEDER_UNROLL
    for (int n = 0; n < kColumns / 8; ++n) {
      const Vector<float, 2> lse =
          memory.lse.template get_vector<2>(stage * kColumns + 8 * n + SumTile::column(0));
      SPEEDER_UNROLL
      for (int i = 0; i < 4; ++i) {
        float& weight = weights[0][n].at[i];
        weight = exp2_fast((weight - lse.at[i % 2]) * kLog2E);
      }
    }
  }

  // Weights become the gradients of scores; `sums` grows by each key's over items.
  SPEEDER_DEVICE void find_grads(SumTile (&weights)[1][kColumns / 8], const Memory& memory,
                                 const Bias& bias, Shared<T> grad, int first, int stage,
                                 float (&sums)[2]) const {
    SumTile grads[1][kColumns / 8];
    dot_products<T, 1, kColumns, kSize>(grads, memory.v, first, grad);
    SPEEDER_UNROLL
    for (int n = 0; n < kColumns / 8; ++n) {
      const int at = stage * kColumns + 8 * n + SumTile::column(0);
      const Vector<float, 2> of = memory.delta.template get_vector<2>(at);
      SPEEDER_UNROLL
      for (int i = 0; i < 4; ++i) weights[0][n].at[i] *= grads[0][n].at[i] - of.at[i % 2];
    }
    if (key_sums == nullptr || bias.kind() == Ranks::kNone) return;
    if (bias.kind() == Ranks::kConsecutive) {
      SPEEDER_UNROLL
      for (int n = 0; n < kColumns / 8; ++n) {
        SPEEDER_UNROLL
        for (int i = 0; i < 4; ++i) sums[i / 2] += weights[0][n].at[i];
      }
      return;
    }
    SPEEDER_UNROLL
    for (int n = 0; n < kColumns / 8; ++n) {
      SPEEDER_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int rank = bias.column_rank(8 * n + SumTile::column(i), stage);
        sums[i / 2] += rank >= 0 ? weights[0][n].at[i] : 0.0f;
      }
    }
  }

  // One head is done: its sums leave, and the next head's begin.
  SPEEDER_DEVICE void keep_key_sums(float (&sums)[2], const Bias& bias, int head, int token,
                                    int first, int rows) const {
    SPEEDER_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float sum = quad_sum(sums[half]);
      const int row = first + SumTile::row(2 * half);
      if (lane() % 4 == 0 && row < rows) {
        key_sums[head * tokens_k + token + row] = bias.row_rank(row) >= 0 ? sum : 0.0f;
      }
      sums[half] = 0.0f;
    }
  }

  // Through the keys' or values' place in shared memory.
  SPEEDER_DEVICE void store(void* out, Shared<T> memory, const SumTile (&sums)[1][kSize / 8],
                            float factor, int64_t at, int64_t stride, int first, int rows) const {
    if (out == nullptr) return;
    keep_sums<T, 1, kSize>(memory, first, sums, [&](int, int) { return factor; });
    sync_block();
    store_rows<T, kRows, kSize, kThreads>(memory, rows, static_cast<int>(call.args.size),
                                          vectorized, Rows<T>{static_cast<T*>(out) + at, stride});
  }
};

template <typename T, int kSize, bool kGradK, bool kGradV>
struct SpaeGradKV : GradKVPass<T, kSize, GradKVShape<kSize>, kGradK, kGradV> {};
template <typename T, int kSize, bool kGradK, bool kGradV>
struct SpaeSmallGradKV : GradKVPass<T, kSize, SmallGradKVShape<kSize>, kGradK, kGradV> {};

}  // namespace cuda
}  // namespace speeder
