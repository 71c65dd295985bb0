// The gradient of the queries and of the relative table: a block has the queries of one tile and
// head and goes over the keys that they see. Where the table takes a gradient, a block has several
// such tiles one after the other, so that there are not too many tables to add up.
//
// A score's gradient is p (dp - delta), with delta the sum over keys of p dp. That is out . grad
// too (SpaeDelta), but for the rounding of `out`, which a table's gradient feels: it sums over many
// rows what should cancel. So where a table takes a gradient, this kernel goes over the keys once
// more, and finds delta first.
#pragma once

#include "cuda/attention/forward.cuh"
#include "cuda/attention/relative_sums.cuh"

namespace speeder {
namespace cuda {

template <typename T, int kSize, typename Shape>
struct GradQPass {
  using Bias = TileBias<Shape, false>;
  using Sums = RelativeSums<Shape>;
  static constexpr int kThreads = Shape::kThreads, kMinBlocks = Shape::kMinBlocks;
  static constexpr int kRows = Shape::kRows, kColumns = Shape::kColumns;
  static_assert(Shape::kRowTiles == 1, "registers are scarce");

  struct Memory {
    static constexpr int kTile = kColumns * kStride<T, kSize>;

    SPEEDER_HOST_DEVICE constexpr Memory()
        : q(layout.take<T>(kRows * kStride<T, kSize>)),
          grad(layout.take<T>(kRows * kStride<T, kSize>)),
          k(layout.take<T>(2 * kTile)),
          v(layout.take<T>(2 * kTile)),
          bias(layout),
          bytes_without_table(layout.bytes()),
          sums(layout) {}
    SharedLayout layout;
    Shared<T> q, grad, k, v;
    typename Bias::Memory bias;
    int64_t bytes_without_table;
    typename Sums::Memory sums;
  };

  AttentionBackward call;
  float* delta;     // (tokens_q, heads)
  bool find_delta;  // and leave it in `delta`; else it is there
  float* tables;    // (shares, heads, buckets), or null
  int64_t tokens;   // queries
  int tiles;        // of the longest sequence
  int shares;
  bool vectorized;  // see load_rows

  // The share of a block that needs no table is one tile: all of them in order, long ones first.
  SPEEDER_DEVICE void operator()() const {
    const AttentionArgs& args = call.args;
    const int heads = static_cast<int>(args.heads);
    const int head = block_index_x() % heads, share = block_index_x() / heads;
    const int all = static_cast<int>(args.sequences) * tiles;
    if (call.grad_q != nullptr) {
      const int64_t first = args.cu_q[args.sequences];
      fill_tail<T>(call.grad_q, first, tokens, args.heads * args.size, 0.0f);
    }
    const Memory memory;
    float* table = nullptr;
    if (tables != nullptr) table = tables + (int64_t{share} * heads + head) * args.buckets;
    Sums sums(memory.sums, table, table != nullptr ? args.buckets : 0);
    for (int n = share; n < all; n += shares) {
      const QueryTile tile = QueryTile::of(n * heads + head, args, tiles, kRows);
      const Span span(args, tile.sequence);
      if (tile.first < span.queries) run_tile(memory, sums, span, tile);
    }
    if (tables != nullptr) sums.finish();
  }

 private:
  SPEEDER_DEVICE void run_tile(const Memory& memory, Sums& sums, const Span& span,
                               const QueryTile& tile) const {
    const AttentionArgs& args = call.args;
    const int rows = smaller(kRows, span.queries - tile.first);
    const int end = larger(span.visible(tile.first + rows - 1, args.causal), 0);
    const int key_tiles = (end + kColumns - 1) / kColumns;
    const int first = warp() * 16, size = static_cast<int>(args.size);
    const int token = span.q0 + tile.first;
    Bias bias(args, memory.bias, token, rows, span.k0, span.keys);
    sync_block();  // the last tile's shared memory is no longer in use
    load_rows<T, kRows, kSize, kThreads>(memory.q, thread_index(), rows, size, vectorized,
                                         rows_of<T>(args.q, token, tile.head));
    load_rows<T, kRows, kSize, kThreads>(memory.grad, thread_index(), rows, size, vectorized,
                                         rows_of<T>(call.grad, token, tile.head));
    if (tables != nullptr) sums.set_rows(args.rank_q + token, rows);
    bias.prefetch(0);
    if (key_tiles > 0) start_tile(memory, bias, span, tile.head, 0, key_tiles);
    commit_copies();

    float row_lse[2], row_delta[2];
    SPEEDER_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = first + SumTile::row(2 * half);
      const int64_t at = int64_t{token + row} * args.heads + tile.head;
      row_lse[half] = row < rows ? call.lse[at] : infinity();
      row_delta[half] = row < rows && !find_delta ? delta[at] : 0.0f;
    }
    SumTile out[1][kSize / 8];
    const bool grads = call.grad_q != nullptr || tables != nullptr;
    const int steps = find_delta && grads ? 2 * key_tiles : key_tiles;
    for (int n = 0; n < steps; ++n) {
      const bool first_pass = find_delta && n < key_tiles;
      if (find_delta && n == key_tiles) keep_delta(row_delta, token, tile.head, first, rows);
      wait_copies<0>();
      sync_block();
      bias.advance();
      if (n + 1 < steps) start_tile(memory, bias, span, tile.head, n + 1, key_tiles);
      commit_copies();
      const int column = (n < key_tiles ? n : n - key_tiles) * kColumns;
      const Shared<T> k = memory.k.part(n % 2 * Memory::kTile, Memory::kTile);
      const Shared<T> v = memory.v.part(n % 2 * Memory::kTile, Memory::kTile);
      const int sees = span.visible(tile.first + first + 15, args.causal);
      SumTile scores[1][kColumns / 8];
      if (first < rows && column < sees) {
        dot_products<T, 1, kColumns, kSize>(scores, memory.q, first, k);
        const float no_row_absolute[1][2] = {};
        bias.add(scores, first, tile.head, n % 2, no_row_absolute);
        if (column + kColumns > span.visible(tile.first + first, args.causal)) {
          const int row = tile.first + first + SumTile::row(0);
          hide<1, kColumns>(scores, span.limit(row, args.causal) - column, args.causal);
        }
        SumTile products[1][kColumns / 8];
        dot_products<T, 1, kColumns, kSize>(products, memory.grad, first, v);
        SPEEDER_UNROLL
        for (int m = 0; m < kColumns / 8; ++m) {
          SPEEDER_UNROLL
          for (int i = 0; i < 4; ++i) {
            float& score = scores[0][m].at[i];
            const float weight = exp2_fast((score - row_lse[i / 2]) * kLog2E);
            if (first_pass) {
              row_delta[i / 2] += weight * products[0][m].at[i];
            } else {
              score = weight * (products[0][m].at[i] - row_delta[i / 2]);
            }
          }
        }
        if (call.grad_q != nullptr && !first_pass) {
          add_weighted<T, 1, kColumns, kSize>(out, scores, k);
        }
      } else {
        SPEEDER_UNROLL
        for (int m = 0; m < kColumns / 8; ++m) scores[0][m] = SumTile{};
      }
      if (tables != nullptr && !first_pass) {
        sums.add(scores, first, bias, memory.bias.ranks.part(n % 2 * kColumns, kColumns));
      }
    }
    if (find_delta && steps == key_tiles) keep_delta(row_delta, token, tile.head, first, rows);
    wait_copies<0>();  // where no key is seen, queries and gradients are still on their way
    if (call.grad_q == nullptr) return;
    sync_block();
    keep_sums<T, 1, kSize>(memory.q, first, out, [&](int, int) { return args.scale; });
    sync_block();
    T* to = static_cast<T*>(call.grad_q) + (int64_t{token} * args.heads + tile.head) * args.size;
    store_rows<T, kRows, kSize, kThreads>(memory.q, rows, size, vectorized,
                                          Rows<T>{to, args.heads * args.size});
  }

  // A row's sum over all keys, from what its four lanes have summed.
  SPEEDER_DEVICE void keep_delta(float (&row_delta)[2], int token, int head, int first,
                                 int rows) const {
    SPEEDER_UNROLL
    for (int half = 0; half < 2; ++half) {
      row_delta[half] = quad_sum(row_delta[half]);
      const int row = first + SumTile::row(2 * half);
      if (lane() % 4 == 0 && row < rows) {
        delta[int64_t{token + row} * call.args.heads + head] = row_delta[half];
      }
    }
  }

  // The tile of step n, which is the second time around from key_tiles on.
  SPEEDER_DEVICE void start_tile(const Memory& memory, Bias& bias, const Span& span, int head,
                                 int n, int key_tiles) const {
    const int column = (n < key_tiles ? n : n - key_tiles) * kColumns;
    start_keys<GradQPass, T, kSize>(*this, memory, bias, span, head, n, column,
                                    n + 1 == key_tiles ? 0 : column + kColumns);
  }
};

template <typename T, int kSize>
struct SpaeGradQ : GradQPass<T, kSize, GradQShape<kSize>> {};
template <typename T, int kSize>
struct SpaeSmallGradQ : GradQPass<T, kSize, SmallGradQShape<kSize>> {};

}  // namespace cuda
}  // namespace speeder
