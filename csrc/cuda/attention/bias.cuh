// The bias between items, for one block of rows against one tile of columns after the other.
//
// Where the ranks of rows and columns all rise one by one, the bias is a Toeplitz matrix: the slice
// of the relative table's row that it is made of, and the slice of the absolute table's, are copied
// to shared memory with the tile, and a score costs one load from a place known at compile time but
// for the lane's own. Other tiles look every pair up by its ranks; tiles without a pair of items
// add nothing.
#pragma once

#include "cuda/attention/tile.cuh"

namespace speeder {
namespace cuda {

enum class Ranks {
  kNone,         // no token is an item
  kConsecutive,  // all are, and their ranks rise one by one
  kAny,
};

struct RankRun {
  Ranks kind = Ranks::kNone;
  int first = -1;  // rank of the first token
};

// The ranks of up to kCount tokens, spread over a warp's lanes. Every warp holds all of them.
template <int kCount>
class HeldRanks {
 public:
  SPEEDER_DEVICE void load(const int32_t* ranks, int count) {
    SPEEDER_UNROLL
    for (int n = 0; n < kHeld; ++n) {
      const int i = n * kWarp + lane();
      at_[n] = i < kCount && i < count ? ranks[i] : -1;
    }
  }

  // What the first `count` are; the same in every lane.
  SPEEDER_DEVICE RankRun look(int count) const {
    const int first = shuffle(at_[0], 0);
    int seen = first < 0 ? 2 : 0;  // 1: an item, 2: not consecutive
    SPEEDER_UNROLL
    for (int n = 0; n < kHeld; ++n) {
      const int i = n * kWarp + lane();
      if (i >= kCount || i >= count) continue;
      if (at_[n] >= 0) seen |= 1;
      if (at_[n] - i != first) seen |= 2;
    }
    SPEEDER_UNROLL
    for (int mask = kWarp / 2; mask > 0; mask /= 2) seen |= shuffle_xor(seen, mask);
    const Ranks kind = !(seen & 1) ? Ranks::kNone : seen & 2 ? Ranks::kAny : Ranks::kConsecutive;
    return {kind, first};
  }

  // Token i's, of the first kCount, by the lanes of warp i / 32.
  SPEEDER_DEVICE void keep(Shared<int> to, int warp) const {
    SPEEDER_UNROLL
    for (int n = 0; n < kHeld; ++n) {
      const int i = n * kWarp + lane();
      if (n == warp && i < kCount) to.set(i, at_[n]);
    }
  }

 private:
  static constexpr int kHeld = (kCount + kWarp - 1) / kWarp;
  int at_[kHeld];
};

// Shape: of the tiles. kRowsAreKeys: and columns queries, or the other way round.
template <typename Shape, bool kRowsAreKeys>
class TileBias {
  static constexpr int kRows = Shape::kRows, kColumns = Shape::kColumns;
  static constexpr int kRowTiles = Shape::kRowTiles, kThreads = Shape::kThreads;
  static constexpr int kSlice = kRows + kColumns;  // diagonals, and one more

 public:
  // Of two tiles: the one in use and the next.
  struct Memory {
    SPEEDER_HOST_DEVICE explicit constexpr Memory(SharedLayout& layout)
        : relative(layout.take<float>(2 * kSlice)),
          absolute(layout.take<float>(kRowsAreKeys ? 0 : 2 * kColumns)),
          ranks(layout.take<int>(2 * kColumns)) {}
    Shared<float> relative, absolute;
    Shared<int> ranks;
  };

  // The block's rows are the tokens from `row_token` on, the columns those of a sequence that
  // begins with `column_token`.
  SPEEDER_DEVICE TileBias(const AttentionArgs& args, const Memory& memory, int row_token, int rows,
                          int column_token, int columns)
      : args_(args),
        memory_(memory),
        row_token_(row_token),
        column_token_(column_token),
        rows_(rows),
        columns_(columns) {
    if (!any()) return;
    HeldRanks<kRows> held;
    held.load(row_ranks(), rows);
    row_run_ = held.look(rows);
  }

  // Fetches the ranks of the tile that begins with column `first`: one tile before stage().
  SPEEDER_DEVICE void prefetch(int first) {
    if (any()) next_.load(column_ranks() + first, columns_ - first);
  }

  // Starts to copy what the tile of column `first` needs; the caller waits for copies.
  SPEEDER_DEVICE void stage(int first, int head, int stage) {
    if (!any()) return;
    const RankRun run = next_.look(columns_ - first);
    const bool none = run.kind == Ranks::kNone || row_run_.kind == Ranks::kNone;
    const bool consecutive =
        run.kind == Ranks::kConsecutive && row_run_.kind == Ranks::kConsecutive;
    staged_ = none ? Ranks::kNone : consecutive ? Ranks::kConsecutive : Ranks::kAny;
    staged_first_ = run.first;
    if (staged_ == Ranks::kAny) next_.keep(memory_.ranks.part(stage * kColumns, kColumns), warp());
    if (staged_ != Ranks::kConsecutive) return;
    if (args_.relative != nullptr) {
      const float* row = args_.relative + head * args_.buckets;
      const int64_t origin = distance_origin(run.first);
      SPEEDER_UNROLL
      for (int n = 0; n < kSlice; n += kThreads) {
        const int x = n + thread_index();
        if (kSlice % kThreads != 0 && x >= kSlice) break;
        const int64_t distance = origin + (kRowsAreKeys ? x : -x);
        copy_async4(memory_.relative, stage * kSlice + x,
                    row + clamp(distance, 0, args_.buckets - 1), true);
      }
    }
    if (!kRowsAreKeys && args_.absolute != nullptr && thread_index() < kColumns) {
      const int64_t position = int64_t{run.first} + thread_index();
      copy_async4(memory_.absolute, stage * kColumns + thread_index(),
                  args_.absolute + head * args_.positions + clamp(position, 0, args_.positions - 1),
                  true);
    }
  }

  // What was staged last is the tile in use from here on.
  SPEEDER_DEVICE void advance() {
    kind_ = staged_;
    column_first_ = staged_first_;
  }
  SPEEDER_DEVICE Ranks kind() const { return kind_; }

  // Of diagonal x = column - row + kRows - 1 of a tile of consecutive ranks, x rising or falling.
  SPEEDER_DEVICE int64_t diagonal_distance(int x) const {
    return distance_origin(column_first_) + (kRowsAreKeys ? x : -x);
  }

  // The ranks of a tile of which kind() is kAny.
  SPEEDER_DEVICE int row_rank(int row) const { return row < rows_ ? row_ranks()[row] : -1; }
  SPEEDER_DEVICE int column_rank(int column, int stage) const {
    return memory_.ranks.get(stage * kColumns + column);
  }

  // What the absolute table adds to a row of keys: 0 where it is no item.
  SPEEDER_DEVICE float row_absolute(int row, int head) const {
    const int rank = args_.absolute != nullptr ? row_rank(row) : -1;
    if (rank < 0) return 0.0f;
    return args_.absolute[head * args_.positions + clamp(rank, 0, args_.positions - 1)];
  }

  // scores = scale * scores + bias, for the warp whose rows begin with `first`; `row_absolute`: of
  // each of the lane's rows, where rows are keys.
  SPEEDER_DEVICE void add(SumTile (&scores)[kRowTiles][kColumns / 8], int first, int head,
                          int stage, const float (&row_absolute)[kRowTiles][2]) const {
    if (kind_ == Ranks::kConsecutive) {
      add_slices(scores, first, stage, row_absolute);
    } else if (kind_ == Ranks::kAny) {
      add_pairs(scores, first, head, stage, row_absolute);
    } else {
      each(scores, [&](int, int, int, float& score) { score *= args_.scale; });
    }
  }

 private:
  SPEEDER_DEVICE const int32_t* row_ranks() const {
    return (kRowsAreKeys ? args_.rank_k : args_.rank_q) + row_token_;
  }
  SPEEDER_DEVICE const int32_t* column_ranks() const {
    return (kRowsAreKeys ? args_.rank_q : args_.rank_k) + column_token_;
  }
  SPEEDER_DEVICE bool any() const { return args_.relative != nullptr || args_.absolute != nullptr; }
  // The distance of diagonal 0, on which the last row meets column 0.
  SPEEDER_DEVICE int64_t distance_origin(int column_first) const {
    const int64_t rows = row_run_.first, columns = column_first;
    return kRowsAreKeys ? columns - rows - (kRows - 1) : rows - columns + (kRows - 1);
  }

  template <typename Body>
  static SPEEDER_DEVICE void each(SumTile (&scores)[kRowTiles][kColumns / 8], const Body& body) {
    SPEEDER_UNROLL
    for (int n = 0; n < kColumns / 8; ++n) {
      SPEEDER_UNROLL
      for (int r = 0; r < kRowTiles; ++r) {
        SPEEDER_UNROLL
        for (int i = 0; i < 4; ++i) body(r, n, i, scores[r][n].at[i]);
      }
    }
  }

  SPEEDER_DEVICE void add_slices(SumTile (&scores)[kRowTiles][kColumns / 8], int first, int stage,
                                 const float (&row_absolute)[kRowTiles][2]) const {
    if (args_.relative != nullptr) {
      // Of the lane's first row and column; the others lie at constant distances.
      const int at = stage * kSlice + kRows - 1 + SumTile::column(0) - first - SumTile::row(0);
      each(scores, [&](int r, int n, int i, float& score) {
        const int x = at + 8 * n + i % 2 - 16 * r - i / 2 * 8;
        score = score * args_.scale + memory_.relative.get(x);
      });
    } else {
      each(scores, [&](int, int, int, float& score) { score *= args_.scale; });
    }
    if (args_.absolute == nullptr) return;
    if constexpr (kRowsAreKeys) {
      each(scores, [&](int r, int, int i, float& score) { score += row_absolute[r][i / 2]; });
    } else {
      add_column_absolute(scores, stage);
    }
  }

  SPEEDER_DEVICE void add_column_absolute(SumTile (&scores)[kRowTiles][kColumns / 8],
                                          int stage) const {
    SPEEDER_UNROLL
    for (int n = 0; n < kColumns / 8; ++n) {
      const int at = stage * kColumns + 8 * n + SumTile::column(0);
      const Vector<float, 2> two = memory_.absolute.template get_vector<2>(at);
      SPEEDER_UNROLL
      for (int r = 0; r < kRowTiles; ++r) {
        SPEEDER_UNROLL
        for (int i = 0; i < 4; ++i) scores[r][n].at[i] += two.at[i % 2];
      }
    }
  }

  SPEEDER_DEVICE void add_pairs(SumTile (&scores)[kRowTiles][kColumns / 8], int first, int head,
                                int stage, const float (&row_absolute)[kRowTiles][2]) const {
    const float* relative = args_.relative + (args_.relative ? head * args_.buckets : 0);
    const float* absolute = args_.absolute + (args_.absolute ? head * args_.positions : 0);
    const int last = static_cast<int>(args_.buckets) - 1;
    const int last_position = static_cast<int>(args_.positions) - 1;
    SPEEDER_UNROLL
    for (int r = 0; r < kRowTiles; ++r) {
      SPEEDER_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = row_rank(first + 16 * r + SumTile::row(2 * half));
        SPEEDER_UNROLL
        for (int n = 0; n < kColumns / 8; ++n) {
          SPEEDER_UNROLL
          for (int c = 0; c < 2; ++c) {
            const int column = column_rank(8 * n + SumTile::column(c), stage);
            float bias = 0.0f;
            if (row >= 0 && column >= 0) {
              if (kRowsAreKeys) {
                bias = row_absolute[r][half];
              } else if (args_.absolute != nullptr) {
                bias = absolute[smaller(column, last_position)];
              }
              if (args_.relative != nullptr) {
                const int distance = kRowsAreKeys ? column - row : row - column;
                bias += relative[smaller(larger(distance, 0), last)];
              }
            }
            float& score = scores[r][n].at[2 * half + c];
            score = score * args_.scale + bias;
          }
        }
      }
    }
  }

  const AttentionArgs& args_;
  const Memory& memory_;
  int row_token_, column_token_;
  int rows_, columns_;
  RankRun row_run_;
  HeldRanks<kColumns> next_;
  Ranks staged_ = Ranks::kNone, kind_ = Ranks::kNone;
  int staged_first_ = 0, column_first_ = 0;
};

}  // namespace cuda
}  // namespace speeder
