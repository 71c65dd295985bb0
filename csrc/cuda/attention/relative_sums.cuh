// The relative table's gradient: the scores' gradients of one block of queries against one tile of
// keys after the other, summed by distance into a table that the block has for itself. Every sum is
// taken by one thread in a fixed order.
//
// Where the items of a tile have ranks of their own within a window as wide as the tile, as they do
// where ranks rise one by one, with or without text between them, a tile in shared memory is laid
// out by rank, and a distance is one of its diagonals: a thread has a diagonal. Other tiles are
// read through by every thread, each for its own share of the distances.
#pragma once

#include "cuda/attention/bias.cuh"

namespace speeder {
namespace cuda {

// The least rank among items, and whether all items of a tile lie within kCount ranks of it, each
// with one of its own. The same in every lane.
struct RankWindow {
  int first;
  bool distinct;
};

template <int kCount>
SPEEDER_DEVICE RankWindow rank_window(Shared<int> ranks) {
  static_assert(kCount <= 64, "a bit of 64 for each rank");
  constexpr int kNoItem = 0x7FFFFFFF;
  int least = kNoItem;
  for (int i = lane(); i < kCount; i += kWarp) {
    if (ranks.get(i) >= 0) least = smaller(least, ranks.get(i));
  }
  for (int mask = kWarp / 2; mask > 0; mask /= 2) least = smaller(least, shuffle_xor(least, mask));
  uint32_t low = 0, high = 0;  // a bit for each rank that was seen
  int items = 0, distinct = 0, inside = 1;
  for (int i = lane(); i < kCount; i += kWarp) {
    const int rank = ranks.get(i);
    if (rank < 0) continue;
    ++items;
    const int place = rank - least;
    if (place < kCount) {
      (place < 32 ? low : high) |= 1u << place % 32;
    } else {
      inside = 0;
    }
  }
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    items += shuffle_xor(items, mask);
    inside &= shuffle_xor(inside, mask);
    low |= shuffle_xor(low, mask);
    high |= shuffle_xor(high, mask);
  }
  for (uint32_t bits = low; bits != 0; bits &= bits - 1) ++distinct;
  for (uint32_t bits = high; bits != 0; bits &= bits - 1) ++distinct;
  return {least, inside == 1 && distinct == items};
}

template <typename Shape>
class RelativeSums {
  static constexpr int kRows = Shape::kRows, kColumns = Shape::kColumns;
  static constexpr int kThreads = Shape::kThreads, kWarps = Shape::kWarps;
  // Rows of the tile lie this far apart, so that a warp's sums of eight rows go to all banks.
  static constexpr int kLine = kColumns + 8;

 public:
  struct Memory {
    SPEEDER_HOST_DEVICE explicit constexpr Memory(SharedLayout& layout)
        : tile(layout.take<float>(kRows * kLine)),
          row_ranks(layout.take<int>(kRows)),
          ends(layout.take<float>(2 * kWarps)) {}
    Shared<float> tile;
    Shared<int> row_ranks;
    Shared<float> ends;
  };

  // `table`: (buckets,), this block's own.
  SPEEDER_DEVICE RelativeSums(const Memory& memory, float* table, int64_t buckets)
      : memory_(memory), table_(table), last_(static_cast<int>(buckets) - 1) {
    for (int b = thread_index(); b <= last_; b += kThreads) table_[b] = 0.0f;
  }

  // The block's rows from here on; the other threads' last use of the ranks is over.
  SPEEDER_DEVICE void set_rows(const int32_t* ranks, int rows) {
    for (int i = thread_index(); i < kRows; i += kThreads) {
      memory_.row_ranks.set(i, i < rows ? ranks[i] : -1);
    }
  }

  // All threads of the block; `grads` are zero where nothing is seen.
  SPEEDER_DEVICE void add(const SumTile (&grads)[1][kColumns / 8], int first,
                          const TileBias<Shape, false>& bias, Shared<int> column_ranks) {
    if (bias.kind() == Ranks::kNone) return;
    if (bias.kind() == Ranks::kConsecutive) {
      const int64_t furthest = bias.diagonal_distance(0);
      const int64_t nearest = bias.diagonal_distance(kRows + kColumns - 2);
      if (furthest <= 0 || nearest >= last_) return add_whole(grads, nearest);
      keep(grads, first, [](int row) { return row; }, [](int column) { return column; });
      sync_block();
      add_diagonals(bias.diagonal_distance(kRows - 1));
      return;
    }
    const RankWindow rows = rank_window<kRows>(memory_.row_ranks);
    const RankWindow columns = rank_window<kColumns>(column_ranks);
    if (!rows.distinct || !columns.distinct) {
      keep(grads, first, [](int row) { return row; }, [](int column) { return column; });
      sync_block();
      read_through(column_ranks);
      return;
    }
    for (int i = thread_index(); i < kRows * kLine; i += kThreads) memory_.tile.set(i, 0.0f);
    sync_block();
    keep(
        grads, first,
        [&](int row) {
          const int rank = memory_.row_ranks.get(row);
          return rank < 0 ? -1 : rank - rows.first;
        },
        [&](int column) {
          const int rank = column_ranks.get(column);
          return rank < 0 ? -1 : rank - columns.first;
        });
    sync_block();
    add_diagonals(int64_t{rows.first} - columns.first);
  }

  // What lies beyond the table's ends goes to the outer buckets. All threads, at the end.
  SPEEDER_DEVICE void finish() {
    const float below = warp_sum(below_), above = warp_sum(above_);
    sync_block();
    if (lane() == 0) {
      memory_.ends.set(warp(), below);
      memory_.ends.set(kWarps + warp(), above);
    }
    sync_block();
    if (thread_index() != 0) return;
    for (int w = 0; w < kWarps; ++w) {
      table_[0] += memory_.ends.get(w);
      table_[last_] += memory_.ends.get(kWarps + w);
    }
  }

 private:
  template <typename RowPlace, typename ColumnPlace>
  SPEEDER_DEVICE void keep(const SumTile (&grads)[1][kColumns / 8], int first,
                           const RowPlace& row_place, const ColumnPlace& column_place) const {
    SPEEDER_UNROLL
    for (int n = 0; n < kColumns / 8; ++n) {
      SPEEDER_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int row = row_place(first + SumTile::row(i));
        const int column = column_place(8 * n + SumTile::column(i));
        if (row >= 0 && column >= 0) memory_.tile.set(row * kLine + column, grads[0][n].at[i]);
      }
    }
  }

  SPEEDER_DEVICE void add_to(int64_t distance, float sum) {
    if (distance <= 0) {
      below_ += sum;
    } else if (distance >= last_) {
      above_ += sum;
    } else {
      table_[distance] += sum;
    }
  }

  // A tile that lies in one of the outer buckets from end to end, as far ones do.
  SPEEDER_DEVICE void add_whole(const SumTile (&grads)[1][kColumns / 8], int64_t distance) {
    float sum = 0.0f;
    SPEEDER_UNROLL
    for (int n = 0; n < kColumns / 8; ++n) {
      SPEEDER_UNROLL
      for (int i = 0; i < 4; ++i) sum += grads[0][n].at[i];
    }
    add_to(distance, sum);
  }

  // `origin`: the distance of row 0 and column 0 of the tile.
  SPEEDER_DEVICE void add_diagonals(int64_t origin) {
    for (int x = thread_index(); x < kRows + kColumns - 1; x += kThreads) {
      const int shift = x - (kColumns - 1);  // row less column
      const int begin = larger(shift, 0), end = smaller(kRows, kColumns + shift);
      float sum = 0.0f;
      for (int row = begin; row < end; ++row) {
        sum += memory_.tile.get(row * kLine + row - shift);
      }
      add_to(origin + shift, sum);
    }
  }

  SPEEDER_DEVICE void read_through(Shared<int> column_ranks) {
    for (int row = 0; row < kRows; ++row) {
      const int rank = memory_.row_ranks.get(row);
      if (rank < 0) continue;
      for (int column = 0; column < kColumns; ++column) {
        const int other = column_ranks.get(column);
        if (other < 0) continue;
        const int distance = smaller(larger(rank - other, 0), last_);
        if (distance % kThreads == thread_index()) {
          add_to(distance, memory_.tile.get(row * kLine + column));
        }
      }
    }
  }

  const Memory& memory_;
  float* table_;
  const int last_;
  float below_ = 0.0f, above_ = 0.0f;
};

}  // namespace cuda
}  // namespace speeder
