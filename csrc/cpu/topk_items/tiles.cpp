// The loops of topk_items: scores a few items against a strip of hidden rows at a time, and looks
// for those above the rows' thresholds. Built once for each instruction set.
#include "cpu/topk_items/tiles.h"

#include "cpu/common/item_strips.h"

namespace speeder {
namespace SPEEDER_ISA {
namespace {

// Up to so many rows (one user's, say) are multiplied with items as these lie in the table: to copy
// an item for a tile would take longer than to read it, and most of a tile's lanes would be empty.
// AMX makes up for that sooner.
#if defined(__AMX_BF16__)
constexpr int64_t kFewRows = 4;
#else
constexpr int64_t kFewRows = 8;
#endif
constexpr int64_t kRowsAtOnce = 4;

int64_t rows_of(const TopkArgs& args, int64_t group) {
  return smaller(kGroupRows, args.rows - group * kGroupRows);
}

template <typename T>
void pack(const TopkArgs& args, int64_t group, float* columns) {
  const int64_t rows = rows_of(args, group);
  const T* hidden = static_cast<const T*>(args.hidden) + group * kGroupRows * args.size;
  Packed<T>* out = reinterpret_cast<Packed<T>*>(columns);
  if (rows <= kFewRows) {
    pack_rows(hidden, args.size, rows, args.size, out, padded_size(args.size) / kInLane<Packed<T>>);
  } else {
    pack_column_strips(hidden, rows, args.size, out);
  }
}

// Hands on what is above its row's threshold, NaN too, of `tile` items and `columns` rows.
inline void find_candidates(const float* scores, int64_t tile, int64_t first_item, int64_t row,
                            int64_t columns, const CandidateSink& sink) {
  for (int64_t c = 0; c < columns; c += kWidth) {
    const Vec threshold = load(sink.thresholds + row + c);
    Ints above = {};
    for (int64_t t = 0; t < tile; ++t) above |= ~(load(scores + t * kStrip + c) <= threshold);
    if (!any(above)) continue;
    for (int64_t t = 0; t < tile; ++t) {
      const Ints hits = ~(load(scores + t * kStrip + c) <= load(sink.thresholds + row + c));
      if (!any(hits)) continue;
      for (int64_t i = 0; i < smaller(kWidth, columns - c); ++i) {
        if (hits[i]) sink.push(sink.state, row + c + i, first_item + t, scores[t * kStrip + c + i]);
      }
    }
  }
}

// Lanes as a product takes them.
inline Vec operand(Vec x, const float*) { return x; }
inline Ints operand(Vec x, const Pair*) { return bitcast<Ints>(x); }

// As many items at once as sums fit into registers: enough that none waits for the one before.
template <int kRows>
constexpr int kItemsAtOnce = kWidth == 16 || kRows <= 2 ? 4 : 2;

// The sums, lane by lane, of some items' products with kRows rows: of item t + i in sums[row][t +
// i].
template <int kRows, typename T, typename P>
inline void multiply_items(const T* const* items, int64_t size, const P* hidden, int64_t ld,
                           Vec (*sums)[kWidth], int64_t t) {
  constexpr int kItems = kItemsAtOnce<kRows>;
  constexpr int64_t kStep = kWidth * kInLane<P>;
  Vec parts[kRows][kItems] = {};
  const auto add = [&](int64_t d, int64_t count) {
#pragma GCC unroll 4
    for (int i = 0; i < kItems; ++i) {
      const auto item = operand(load_lanes(items[i] + d, count, hidden), hidden);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const auto row = load(hidden + r * ld + d / kInLane<P>);
        parts[r][i] = multiply_add(row, item, parts[r][i]);
      }
    }
  };
  const int64_t whole = size / kStep * kStep;
  for (int64_t d = 0; d < whole; d += kStep) add(d, kStep);
  if (whole < size) add(whole, size - whole);
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kItems; ++i) sums[r][t + i] = parts[r][i];
  }
}

// Scores of up to kWidth items, `table` being the first, for kRows rows from `row` of the group on.
template <int kRows, typename T>
void score_few(const T* table, int64_t size, int64_t items, const float* rows, int64_t row,
               int64_t first, const CandidateSink& sink) {
  using P = Packed<T>;
  constexpr int kItems = kItemsAtOnce<kRows>;
  const int64_t ld = padded_size(size) / kInLane<P>;
  const P* hidden = reinterpret_cast<const P*>(rows) + row * ld;
  Vec sums[kRows][kWidth] = {};
  for (int64_t t = 0; t < items; t += kItems) {
    const T* some[kItems];
    for (int j = 0; j < kItems; ++j) some[j] = table + smaller(t + j, items - 1) * size;
    multiply_items<kRows>(some, size, hidden, ld, sums, t);
  }
  for (int r = 0; r < kRows; ++r) {
    const Vec scores = sums_of(sums[r]);
    if (!any(~(scores <= splat(sink.thresholds[row + r])))) continue;
    for (int64_t t = 0; t < items; ++t) {
      if (scores[t] <= sink.thresholds[row + r]) continue;
      sink.push(sink.state, row + r, first + t, scores[t]);
    }
  }
}

// As `score`, for up to kFewRows rows: some of them at a time, over items that are in the cache.
template <typename T>
void score_all_few(const TopkArgs& args, int64_t rows, const float* packed, int64_t first,
                   int64_t count, const CandidateSink& sink) {
  using Few =
      void (*)(const T*, int64_t, int64_t, const float*, int64_t, int64_t, const CandidateSink&);
  static constexpr Few kByRows[kRowsAtOnce] = {score_few<1, T>, score_few<2, T>, score_few<3, T>,
                                               score_few<4, T>};
  for (int64_t i = first; i < first + count; i += kWidth) {
    const T* table = static_cast<const T*>(args.table) + i * args.size;
    const int64_t items = smaller(kWidth, first + count - i);
    for (int64_t row = 0; row < rows; row += kRowsAtOnce) {
      const Few few = kByRows[smaller(kRowsAtOnce, rows - row) - 1];
      few(table, args.size, items, packed, row, i, sink);
    }
  }
}

template <typename T>
void score(const TopkArgs& args, int64_t group, const float* columns, int64_t first, int64_t count,
           const CandidateSink& sink, float* scratch) {
  using P = Packed<T>;
  const int64_t rows = rows_of(args, group);
  if (rows <= kFewRows) return score_all_few<T>(args, rows, columns, first, count, sink);
  const int64_t ld = padded_size(args.size) / kInLane<P>, depth = lanes_of<P>(args.size);
  P* items = reinterpret_cast<P*>(scratch);
  float* scores = scratch + kMostTileRows * padded_size(args.size);
  const P* hidden = reinterpret_cast<const P*>(columns);
  TileRegisters registers;
  for (int64_t i = first; i < first + count; i += kTileRows) {
    const int64_t tile = smaller(kTileRows, first + count - i);
    const T* table = static_cast<const T*>(args.table) + i * args.size;
    pack_rows(table, args.size, tile, args.size, items, ld);
    for (int64_t n = 0; n < strips_of(rows); ++n) {
      const int64_t left = smaller(kStrip, rows - n * kStrip);
      product<false>(registers, tile, vecs_of(left), depth, items, ld, strip(hidden, ld, n), kStrip,
                     scores, kStrip, false);
      find_candidates(scores, tile, i, n * kStrip, left, sink);
    }
  }
}

template <typename T>
constexpr TopkKernels kernels() {
  return {pack<T>, score<T>};
}

}  // namespace

#if defined(__AVX512BF16__)
const TopkKernels kTopk[3] = {{}, kernels<BFloat16>(), {}};
#else
const TopkKernels kTopk[3] = {kernels<float>(), kernels<BFloat16>(), kernels<Half>()};
#endif

}  // namespace SPEEDER_ISA
}  // namespace speeder
