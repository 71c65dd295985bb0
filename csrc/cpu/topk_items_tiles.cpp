// The loops of topk_items: scores a few items against a strip of hidden rows at a time, and looks
// for those above the rows' thresholds. Built once for each instruction set.
#include "cpu/topk_items_tiles.h"

#include "cpu/item_strips.h"

namespace speeder {
namespace SPEEDER_ISA {
namespace {

template <typename T>
void pack(const TopkArgs& args, int64_t group, float* columns) {
  const int64_t first = group * kGroupRows, rows = smaller(kGroupRows, args.rows - first);
  const T* hidden = static_cast<const T*>(args.hidden) + first * args.size;
  pack_column_strips(hidden, rows, args.size, reinterpret_cast<Packed<T>*>(columns));
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

template <typename T>
void score(const TopkArgs& args, int64_t group, const float* columns, int64_t first, int64_t count,
           const CandidateSink& sink, float* scratch) {
  using P = Packed<T>;
  const int64_t rows = smaller(kGroupRows, args.rows - group * kGroupRows);
  const int64_t ld = padded_size(args.size) / kInLane<P>, depth = lanes_of<P>(args.size);
  P* items = reinterpret_cast<P*>(scratch);
  float* scores = scratch + kMostTileRows * padded_size(args.size);
  const P* hidden = reinterpret_cast<const P*>(columns);
  for (int64_t i = first; i < first + count; i += kTileRows) {
    const int64_t tile = smaller(kTileRows, first + count - i);
    const T* table = static_cast<const T*>(args.table) + i * args.size;
    pack_rows(table, args.size, tile, args.size, items, ld);
    for (int64_t n = 0; n < strips_of(rows); ++n) {
      const int64_t left = smaller(kStrip, rows - n * kStrip);
      find_tile<false, P, P>(tile, vecs_of(left))(depth, items, ld, strip(hidden, ld, n), kStrip,
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
