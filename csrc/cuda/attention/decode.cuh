// The forward pass of spae_attention where sequences have few queries: the queries of a sequence
// times the heads of a group are the rows of one tile, and the keys are shared among blocks and
// their warps. Each warp leaves the sums over its keys in the working memory; SpaeCombine adds them
// up in order.
#pragma once

#include "cuda/attention/forward.cuh"

namespace speeder {
namespace cuda {

// A warp's share of a sequence's keys, in tiles.
struct KeyShare {
  int begin, end;
};

// What the rows of one share come to: (rows, size) weighted values, then (rows,) the largest scores
// and (rows,) the sums of weights.
struct DecodeSums {
  float* values;
  float* top;
  float* total;

  SPEEDER_DEVICE DecodeSums(float* scratch, int64_t share, int rows, int size)
      : values(scratch + share * rows * (size + 2)), top(values + rows * size), total(top + rows) {}
};

template <typename T, int kSize, typename Shape>
struct DecodePass {
  static constexpr int kThreads = Shape::kThreads, kMinBlocks = Shape::kMinBlocks;
  static constexpr int kWarps = Shape::kWarps, kColumns = Shape::kColumns;
  static constexpr int kTile = kColumns * kStride<T, kSize>;

  struct Memory {
    SPEEDER_HOST_DEVICE constexpr Memory()
        : q(layout.take<T>(kDecodeRows * kStride<T, kSize>)),
          k(layout.take<T>(2 * kWarps * kTile)),
          v(layout.take<T>(2 * kWarps * kTile)) {}
    SharedLayout layout;
    Shared<T> q, k, v;
  };

  // Row r of the tile: query r / group, head r % group of the key head's.
  struct QueryRows {
    const TokenView& view;
    int first, head, group;
    SPEEDER_DEVICE const T* operator()(int r) const {
      return rows_of<T>(view, first + r / group, head + r % group)(0);
    }
  };

  AttentionForward call;
  float* scratch;
  int splits, row_count;  // rows: of the longest sequence, which no other passes
  bool vectorized;        // see load_rows

  SPEEDER_DEVICE void operator()() const {
    const AttentionArgs& args = call.args;
    const int kv_heads = static_cast<int>(args.kv_heads), size = static_cast<int>(args.size);
    const int group = static_cast<int>(args.heads) / kv_heads;
    const int split = block_index_x() % splits, pair = block_index_x() / splits;
    const int kv_head = pair % kv_heads, head = kv_head * group;
    const Span span(args, pair / kv_heads);
    // There is working memory for no more than row_count, and nobody has read the lengths.
    const int rows = smaller(span.queries * group, row_count);
    if (rows <= 0) return;
    const Memory memory;
    load_rows<T, kDecodeRows, kSize, kThreads>(memory.q, thread_index(), rows, size, vectorized,
                                               QueryRows{args.q, span.q0, head, group});
    const KeyShare share = share_of(span.keys, split * kWarps + warp());
    if (share.begin < share.end) start_tile(memory, span, kv_head, share.begin);
    commit_copies();
    wait_copies<0>();
    sync_block();  // the queries are there, for every warp

    OnlineSoftmax<T, 1, kColumns, kSize> softmax;
    for (int n = share.begin; n < share.end; ++n) {
      if (n + 1 < share.end) start_tile(memory, span, kv_head, n + 1);
      commit_copies();
      const Shared<T> k = tile_of(memory.k, n), v = tile_of(memory.v, n);
      SumTile scores[1][kColumns / 8];
      dot_products<T, 1, kColumns, kSize>(scores, memory.q, 0, k);
      finish_scores(scores, span, n * kColumns, head, group);
      softmax.add(scores, v);
      wait_copies<0>();
      sync_warp();  // the warp's next tile is there, and this one is done with
    }
    softmax.finish();
    leave(softmax, DecodeSums(scratch, block_index_x() * int64_t{kWarps} + warp(), row_count, size),
          rows, size);
  }

 private:
  SPEEDER_DEVICE KeyShare share_of(int keys, int n) const {
    const int64_t tiles = (keys + kColumns - 1) / kColumns, shares = splits * kWarps;
    return {static_cast<int>(tiles * n / shares), static_cast<int>(tiles * (n + 1) / shares)};
  }

  SPEEDER_DEVICE static Shared<T> tile_of(Shared<T> tiles, int n) {
    return tiles.part((2 * warp() + n % 2) * kTile, kTile);
  }

  SPEEDER_DEVICE void start_tile(const Memory& memory, const Span& span, int kv_head, int n) const {
    const AttentionArgs& args = call.args;
    const int column = n * kColumns, count = span.keys - column, size = static_cast<int>(args.size);
    load_rows<T, kColumns, kSize, kWarp>(tile_of(memory.k, n), lane(), count, size, vectorized,
                                         rows_of<T>(args.k, span.k0 + column, kv_head));
    load_rows<T, kColumns, kSize, kWarp>(tile_of(memory.v, n), lane(), count, size, vectorized,
                                         rows_of<T>(args.v, span.k0 + column, kv_head));
  }

  // Scale, bias and mask. A lane's two rows may be of different heads.
  SPEEDER_DEVICE void finish_scores(SumTile (&scores)[1][kColumns / 8], const Span& span,
                                    int column, int head, int group) const {
    const AttentionArgs& args = call.args;
    const bool any = args.relative != nullptr || args.absolute != nullptr;
    SPEEDER_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = SumTile::row(2 * half), query = row / group;
      const int64_t row_head = head + row % group;
      const int visible = query < span.queries ? span.visible(query, args.causal) : 0;
      const int row_rank = any && query < span.queries ? args.rank_q[span.q0 + query] : -1;
      SPEEDER_UNROLL
      for (int n = 0; n < kColumns / 8; ++n) {
        SPEEDER_UNROLL
        for (int c = 0; c < 2; ++c) {
          const int key = column + 8 * n + SumTile::column(c);
          float& score = scores[0][n].at[2 * half + c];
          score = key < visible ? score * args.scale : -infinity();
          if (row_rank < 0 || key >= visible) continue;
          const int rank = args.rank_k[span.k0 + key];
          if (rank < 0) continue;
          if (args.relative != nullptr) {
            score += args.relative[row_head * args.buckets +
                                   clamp(row_rank - rank, 0, args.buckets - 1)];
          }
          if (args.absolute != nullptr) {
            score += args.absolute[row_head * args.positions + clamp(rank, 0, args.positions - 1)];
          }
        }
      }
    }
  }

  SPEEDER_DEVICE void leave(const OnlineSoftmax<T, 1, kColumns, kSize>& softmax,
                            const DecodeSums& sums, int rows, int size) const {
    SPEEDER_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = SumTile::row(2 * half);
      if (row >= rows) continue;
      SPEEDER_UNROLL
      for (int n = 0; n < kSize / 8; ++n) {
        SPEEDER_UNROLL
        for (int c = 0; c < 2; ++c) {
          const int column = 8 * n + SumTile::column(c);
          if (column < size) {
            sums.values[row * size + column] = softmax.out[0][n].at[2 * half + c];
          }
        }
      }
      if (lane() % 4 == 0) {
        sums.top[row] = softmax.top[0][half];
        sums.total[row] = softmax.total[0][half];
      }
    }
  }
};

template <typename T, int kSize>
struct SpaeDecode : DecodePass<T, kSize, DecodeShape<kSize>> {};
template <typename T, int kSize>
struct SpaeSmallDecode : DecodePass<T, kSize, SmallDecodeShape<kSize>> {};

// A warp has one row: its output from the shares, added up in a fixed order.
template <typename T>
struct SpaeCombine {
  static constexpr int kThreads = 128, kMinBlocks = 1;

  AttentionForward call;
  float* scratch;
  int64_t tokens;  // queries
  int shares, row_count;

  SPEEDER_DEVICE void operator()() const {
    const AttentionArgs& args = call.args;
    const int kv_heads = static_cast<int>(args.kv_heads), size = static_cast<int>(args.size);
    const int group = static_cast<int>(args.heads) / kv_heads;
    fill_tail<T>(call, tokens);
    const int64_t n = block_index_x() * int64_t{kThreads / kWarp} + warp();
    if (n >= args.sequences * kv_heads * row_count) return;
    const int row = static_cast<int>(n % row_count);
    const int64_t pair = n / row_count;
    const Span span(args, static_cast<int>(pair / kv_heads));
    if (row >= span.queries * group) return;
    float top = -infinity();
    for (int s = lane(); s < shares; s += kWarp) {
      top = larger(top, DecodeSums(scratch, pair * shares + s, row_count, size).top[row]);
    }
    top = warp_max(top);
    const float origin = top == -infinity() ? 0.0f : top;
    float total = 0.0f;
    for (int s = lane(); s < shares; s += kWarp) {
      const DecodeSums sums(scratch, pair * shares + s, row_count, size);
      total += exp2_fast((sums.top[row] - origin) * kLog2E) * sums.total[row];
    }
    total = warp_sum(total);
    const int64_t head = pair % kv_heads * group + row % group;
    const int64_t at = (span.q0 + row / group) * args.heads + head;
    for (int d = lane(); d < size; d += kWarp) {
      float sum = 0.0f;
      for (int s = 0; s < shares; ++s) {
        const DecodeSums sums(scratch, pair * shares + s, row_count, size);
        sum += exp2_fast((sums.top[row] - origin) * kLog2E) * sums.values[row * size + d];
      }
      static_cast<T*>(call.out)[at * size + d] = from_float<T>(total == 0.0f ? 0.0f : sum / total);
    }
    if (lane() == 0) call.lse[at] = log_sum_exp(top, total);
  }
};

}  // namespace cuda
}  // namespace speeder
