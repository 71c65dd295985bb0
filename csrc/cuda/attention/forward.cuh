// The forward pass of spae_attention: a block has the queries of one tile, sequence and head, and
// goes over the keys that they see. While it computes with one tile of keys and values, the next is
// on its way to the other half of shared memory.
#pragma once

#include "cuda/attention/bias.cuh"
#include "cuda/attention/softmax.cuh"

namespace speeder {
namespace cuda {

// Which tile of which sequence and head a block has: heads of one tile come one after the other,
// since they read the same keys, and long work first.
struct QueryTile {
  int sequence, head, first;  // of the tile's queries, in the sequence

  static SPEEDER_DEVICE QueryTile of(int block, const AttentionArgs& args, int tiles, int rows) {
    const int heads = static_cast<int>(args.heads), rest = block / heads;
    return {rest / tiles, block % heads, (tiles - 1 - rest % tiles) * rows};
  }
};

// What a query gets that sees no key, for those behind the last sequence.
template <typename T>
SPEEDER_DEVICE void fill_tail(const AttentionForward& call, int64_t tokens) {
  const AttentionArgs& args = call.args;
  const int64_t first = args.cu_q[args.sequences];
  fill_tail<T>(call.out, first, tokens, args.heads * args.size, 0.0f);
  fill_tail<float>(call.lse, first, tokens, args.heads, infinity());
}

// One sequence's tokens, and where its last queries stand among the keys.
struct Span {
  int q0, k0, queries, keys;

  SPEEDER_DEVICE Span(const AttentionArgs& args, int sequence)
      : q0(args.cu_q[sequence]),
        k0(args.cu_k[sequence]),
        queries(args.cu_q[sequence + 1] - q0),
        keys(args.cu_k[sequence + 1] - k0) {}

  // Query i sees the keys below this; not always above 0. The same without regard to the last key,
  // which no query of the sequence passes.
  SPEEDER_DEVICE int limit(int i, bool causal) const {
    return causal ? i + 1 + keys - queries : keys;
  }
  SPEEDER_DEVICE int visible(int i, bool causal) const { return smaller(limit(i, causal), keys); }
};

// Sends tile n of the keys, values and their ranks on their way to their half of shared memory:
// those of one head from key `column` on. `following` is the column whose ranks come after them.
template <typename Kernel, typename T, int kSize>
SPEEDER_DEVICE void start_keys(const Kernel& kernel, const typename Kernel::Memory& memory,
                               typename Kernel::Bias& bias, const Span& span, int head, int n,
                               int column, int following) {
  constexpr int kTile = Kernel::Memory::kTile;
  const AttentionArgs& args = kernel.call.args;
  const int count = span.keys - column, size = static_cast<int>(args.size);
  const int kv_head = head / (static_cast<int>(args.heads) / static_cast<int>(args.kv_heads));
  load_rows<T, Kernel::kColumns, kSize, Kernel::kThreads>(
      memory.k.part(n % 2 * kTile, kTile), thread_index(), count, size, kernel.vectorized,
      rows_of<T>(args.k, span.k0 + column, kv_head));
  load_rows<T, Kernel::kColumns, kSize, Kernel::kThreads>(
      memory.v.part(n % 2 * kTile, kTile), thread_index(), count, size, kernel.vectorized,
      rows_of<T>(args.v, span.k0 + column, kv_head));
  bias.stage(column, head, n % 2);
  bias.prefetch(following);
}

template <typename T, int kSize, typename Shape>
struct ForwardPass {
  using Bias = TileBias<Shape, false>;
  static constexpr int kThreads = Shape::kThreads, kMinBlocks = Shape::kMinBlocks;
  static constexpr int kRows = Shape::kRows, kColumns = Shape::kColumns;
  static constexpr int kRowTiles = Shape::kRowTiles;

  struct Memory {
    static constexpr int kTile = kColumns * kStride<T, kSize>;

    SPEEDER_HOST_DEVICE constexpr Memory()
        : q(layout.take<T>(kRows * kStride<T, kSize>)),
          k(layout.take<T>(2 * kTile)),
          v(layout.take<T>(2 * kTile)),
          bias(layout) {}
    SharedLayout layout;
    Shared<T> q, k, v;
    typename Bias::Memory bias;
  };

  AttentionForward call;
  int64_t tokens;   // queries
  int tiles;        // of the longest sequence
  bool vectorized;  // see load_rows

  SPEEDER_DEVICE void operator()() const {
    const AttentionArgs& args = call.args;
    const QueryTile tile = QueryTile::of(block_index_x(), args, tiles, kRows);
    const Span span(args, tile.sequence);
    fill_tail<T>(call, tokens);
    if (tile.first >= span.queries) return;
    const int rows = smaller(kRows, span.queries - tile.first);
    const int end = larger(span.visible(tile.first + rows - 1, args.causal), 0);
    const int key_tiles = (end + kColumns - 1) / kColumns;
    const int first = warp() * 16 * kRowTiles;  // of the warp's rows
    const int size = static_cast<int>(args.size);
    const Memory memory;
    Bias bias(args, memory.bias, span.q0 + tile.first, rows, span.k0, span.keys);

    load_rows<T, kRows, kSize, kThreads>(memory.q, thread_index(), rows, size, vectorized,
                                         rows_of<T>(args.q, span.q0 + tile.first, tile.head));
    bias.prefetch(0);
    if (key_tiles > 0) start_tile(memory, bias, span, tile.head, 0);
    commit_copies();

    OnlineSoftmax<T, kRowTiles, kColumns, kSize> softmax;
    for (int n = 0; n < key_tiles; ++n) {
      wait_copies<0>();
      sync_block();
      bias.advance();
      if (n + 1 < key_tiles) start_tile(memory, bias, span, tile.head, n + 1);
      commit_copies();
      const int column = n * kColumns;
      const int sees = span.visible(tile.first + first + 16 * kRowTiles - 1, args.causal);
      if (first >= rows || column >= sees) continue;  // nothing for this warp

      const Shared<T> k = memory.k.part(n % 2 * Memory::kTile, Memory::kTile);
      const Shared<T> v = memory.v.part(n % 2 * Memory::kTile, Memory::kTile);
      SumTile scores[kRowTiles][kColumns / 8];
      dot_products<T, kRowTiles, kColumns, kSize>(scores, memory.q, first, k);
      const float no_row_absolute[kRowTiles][2] = {};
      bias.add(scores, first, tile.head, n % 2, no_row_absolute);
      if (column + kColumns > span.visible(tile.first + first, args.causal)) {
        const int row = tile.first + first + SumTile::row(0);
        hide<kRowTiles, kColumns>(scores, span.limit(row, args.causal) - column, args.causal);
      }
      softmax.add(scores, v);
    }
    softmax.finish();
    store(memory, softmax, span, tile, rows, first);
  }

 private:
  SPEEDER_DEVICE void start_tile(const Memory& memory, Bias& bias, const Span& span, int head,
                                 int n) const {
    const int column = n * kColumns;
    start_keys<ForwardPass, T, kSize>(*this, memory, bias, span, head, n, column,
                                      column + kColumns);
  }

  // Through the queries' place in shared memory, so that rows are written 16 bytes at a time.
  SPEEDER_DEVICE void store(const Memory& memory,
                            const OnlineSoftmax<T, kRowTiles, kColumns, kSize>& softmax,
                            const Span& span, const QueryTile& tile, int rows, int first) const {
    const AttentionArgs& args = call.args;
    const int token = span.q0 + tile.first;
    wait_copies<0>();  // where there was no tile of keys, the queries are still on their way
    sync_block();
    keep_sums<T, kRowTiles, kSize>(memory.q, first, softmax.out,
                                   [&](int r, int half) { return softmax.inverse(r, half); });
    SPEEDER_UNROLL
    for (int r = 0; r < kRowTiles; ++r) {
      SPEEDER_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = first + 16 * r + SumTile::row(2 * half);
        if (lane() % 4 != 0 || row >= rows) continue;
        call.lse[int64_t{token + row} * args.heads + tile.head] =
            log_sum_exp(softmax.top[r][half], softmax.total[r][half]);
      }
    }
    sync_block();
    T* out = static_cast<T*>(call.out) + (int64_t{token} * args.heads + tile.head) * args.size;
    store_rows<T, kRows, kSize, kThreads>(memory.q, rows, static_cast<int>(args.size), vectorized,
                                          Rows<T>{out, args.heads * args.size});
  }
};

template <typename T, int kSize>
struct SpaeForward : ForwardPass<T, kSize, ForwardShape<kSize>> {};
template <typename T, int kSize>
struct SpaeSmallForward : ForwardPass<T, kSize, SmallForwardShape<kSize>> {};

}  // namespace cuda
}  // namespace speeder
