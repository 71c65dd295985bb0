// The loops of item_cross_entropy, over tiles of scores in which a hidden row's items lie in one
// lane: its maximum and its sum need no horizontal reduction. Built once for each instruction set.
#include "cpu/item_cross_entropy/tiles.h"

#include "cpu/common/item_strips.h"

namespace speeder {
namespace SPEEDER_ISA {
namespace {

constexpr float kLog2E = 1.44269504088896341f;

template <typename T>
void pack(const ItemLossArgs& args, const PackedHidden& packed, int64_t group) {
  using P = Packed<T>;
  const int64_t first = group * kGroupRows, rows = smaller(kGroupRows, args.rows - first);
  const T* hidden = static_cast<const T*>(args.hidden) + first * args.size;
  P* columns = reinterpret_cast<P*>(packed.columns + group * group_floats(args.size));
  pack_column_strips(hidden, rows, args.size, columns);
  if (packed.depth == nullptr) return;
  P* depths = reinterpret_cast<P*>(packed.depth + group * group_floats(args.size));
  pack_depth_strips(hidden, rows, args.size, depths);
}

// For each lane of a strip: top and total take in `tile` rows of scores, after factor and shift
// (one a row).
inline void add_scores(const float* scores, int64_t tile, int64_t vecs, float factor,
                       const float* shifts, float* top, float* total) {
  for (int64_t v = 0; v < vecs; ++v) {
    Vec score[kTileRows];
    const Vec before = load(top + v * kWidth);
    Vec most = before;
    for (int64_t r = 0; r < tile; ++r) {
      score[r] = load(scores + r * kStrip + v * kWidth) * factor - shifts[r];
      most = largest(score[r], most);
    }
    const Vec base = most == -kInfinity ? Vec{} : most;  // all are -inf: sums 0, not NaN
    Vec part =
        {};  // of its own: one long chain of sums would round every term in the same direction
    for (int64_t r = 0; r < tile; ++r) part += exp2(score[r] - base);
    store(top + v * kWidth, most);
    store(total + v * kWidth, load(total + v * kWidth) * exp2(before - base) + part);
  }
}

inline void load_shifts(const ItemLossArgs& args, int64_t first, int64_t count, float* shifts) {
  for (int64_t r = 0; r < count; ++r) {
    shifts[r] = args.log_q ? args.log_q[first + r] * kLog2E : 0.0f;
  }
}

template <typename T>
void forward(const ItemLossArgs& args, const PackedHidden& packed, int64_t group, int64_t first,
             int64_t count, float* top, float* total, float* scratch) {
  using P = Packed<T>;
  const ItemLossScratch at(args.size, false, scratch);
  const int64_t rows = smaller(kGroupRows, args.rows - group * kGroupRows);
  const int64_t ld = padded_size(args.size) / kInLane<P>, depth = lanes_of<P>(args.size);
  const P* columns = reinterpret_cast<const P*>(packed.columns + group * group_floats(args.size));
  P* items = reinterpret_cast<P*>(at.items);
  TileRegisters registers;
  for (int64_t n = 0; n < kGroupRows; n += kWidth) {
    store(top + n, splat(-kInfinity));
    store(total + n, Vec{});
  }
  for (int64_t i = first; i < first + count; i += kForwardItems) {
    const int64_t block = smaller(kForwardItems, first + count - i);
    const T* table = static_cast<const T*>(args.table) + i * args.size;
    pack_rows(table, args.size, block, args.size, items, ld);
    for (int64_t n = 0; n < strips_of(rows); ++n) {
      const int64_t vecs = vecs_of(rows - n * kStrip);
      for (int64_t r = 0; r < block; r += kTileRows) {
        const int64_t tile = smaller(kTileRows, block - r);
        float shifts[kTileRows];
        load_shifts(args, i + r, tile, shifts);
        product<false>(registers, tile, vecs, depth, items + r * ld, ld, strip(columns, ld, n),
                       kStrip, at.scores, kStrip, false);
        add_scores(at.scores, tile, vecs, args.scale * kLog2E, shifts, top + n * kStrip,
                   total + n * kStrip);
      }
    }
  }
}

template <typename T>
void target_logits(const ItemLossArgs& args, int64_t begin, int64_t end, float* logits) {
  const int64_t whole = args.size / kWidth * kWidth;
  for (int64_t n = begin; n < end; ++n) {
    const T* a = static_cast<const T*>(args.hidden) + n * args.size;
    const T* b = static_cast<const T*>(args.table) + args.targets[n] * args.size;
    Vec total = {};
    for (int64_t d = 0; d < whole; d += kWidth) total += load(a + d) * load(b + d);
    if (whole < args.size) {
      const int64_t left = args.size - whole;
      total += load_part(a + whole, left) * load_part(b + whole, left);
    }
    logits[n] = sum(total) * args.scale - (args.log_q ? args.log_q[args.targets[n]] : 0.0f);
  }
}

// A block of items: for each group of hidden rows, the logits' gradient, and the two products that
// it goes into.
template <typename T>
class Backward {
  using P = Packed<T>;

 public:
  Backward(const ItemLossBackward& call, const PackedHidden& packed, const ItemLossTask& task,
           float* scratch)
      : call_(call),
        args_(call.args),
        packed_(packed),
        task_(task),
        at_(args_.size, true, scratch),
        width_(padded_size(args_.size)),
        ld_(width_ / kInLane<P>),
        depth_(lanes_of<P>(args_.size)) {}

  void run() {
    const int64_t first = task_.first, count = task_.count;
    const T* table = static_cast<const T*>(args_.table) + first * args_.size;
    pack_rows(table, args_.size, count, args_.size, packed(at_.items), ld_);
    if (task_.grad_hidden != nullptr) {
      pack_depth_strips(table, count, args_.size, packed(at_.items_depth));
    }
    const int64_t groups = groups_of(args_.rows);
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t rows = smaller(kGroupRows, args_.rows - group * kGroupRows);
      const int64_t left = groups - group - 1;
      grad_logits(first, count, group, rows);
      if (call_.grad_table != nullptr) add_grad_items(count, group, rows);
      if (task_.grad_hidden == nullptr) continue;
      if (task_.before != nullptr) wait_for(task_.before, left);
      add_grad_hidden(count, group, rows, task_.before != nullptr);
      lower(task_.left, left);
    }
    if (call_.grad_table == nullptr) return;
    T* out = static_cast<T*>(call_.grad_table) + first * args_.size;
    for (int64_t r = 0; r < count; ++r) {
      store_row(out + r * args_.size, at_.grad_items + r * width_, args_.size, 1.0f);
    }
  }

 private:
  static P* packed(float* memory) { return reinterpret_cast<P*>(memory); }
  const P* group_of(const float* memory, int64_t group) const {
    return reinterpret_cast<const P*>(memory + group * group_floats(args_.size));
  }

  void grad_logits(int64_t first, int64_t count, int64_t group, int64_t rows) {
    const int64_t row = group * kGroupRows;
    alignas(64) float lse[kGroupRows], factors[kGroupRows];
    alignas(64) int32_t targets[kGroupRows];  // within the block; -1 elsewhere
    for (int64_t n = 0; n < kGroupRows; ++n) {
      const int64_t target = n < rows ? args_.targets[row + n] - first : -1;
      lse[n] = n < rows ? call_.lse[row + n] * kLog2E : kInfinity;  // past the rows: weight 0
      factors[n] = n < rows ? call_.grad[row + n] * args_.scale : 0.0f;
      targets[n] = target >= 0 && target < count ? static_cast<int32_t>(target) : -1;
    }
    const P* columns = group_of(packed_.columns, group);
    for (int64_t n = 0; n < strips_of(rows); ++n) {
      const int64_t vecs = vecs_of(rows - n * kStrip), column = n * kStrip;
      for (int64_t r = 0; r < count; r += kTileRows) {
        const int64_t tile = smaller(kTileRows, count - r);
        float shifts[kTileRows];
        load_shifts(args_, first + r, tile, shifts);
        product<false>(registers_, tile, vecs, depth_, packed(at_.items) + r * ld_, ld_,
                       strip(columns, ld_, n), kStrip, at_.scores, kStrip, false);
        for (int64_t v = 0; v < vecs; ++v) {
          const int64_t c = column + v * kWidth;
          Ints target;
          __builtin_memcpy(&target, targets + c, sizeof(target));
          for (int64_t t = 0; t < tile; ++t) {
            float* score = at_.scores + t * kStrip + v * kWidth;
            const Vec weight =
                exp2(load(score) * (args_.scale * kLog2E) - shifts[t] - load(lse + c));
            const Vec hit = target == static_cast<int32_t>(r + t) ? splat(1.0f) : Vec{};
            store(score, (weight - hit) * load(factors + c));
          }
        }
        keep(r, tile, column, vecs, packed(at_.grads));
      }
    }
  }

  // A tile of gradients to where the two products read it: floats in one layout for both, ...
  void keep(int64_t r, int64_t tile, int64_t column, int64_t vecs, float* out) {
    for (int64_t t = 0; t < tile; ++t) {
      for (int64_t v = 0; v < vecs; ++v) {
        store(out + (r + t) * kGroupRows + column + v * kWidth,
              load(at_.scores + t * kStrip + v * kWidth));
      }
    }
  }
  const float* grads_by_row(const float* grads) const { return grads; }

#if defined(__AVX512BF16__)
  // ... pairs of bfloat16 along the hidden rows, and along the items.
  void keep(int64_t r, int64_t tile, int64_t column, int64_t vecs, Pair* out) {
    static_assert(kTileRows % 2 == 0, "a pair of items lies in one tile");
    for (int64_t v = 0; v < vecs; ++v) {
      const float* score = at_.scores + v * kWidth;
      BFloat16* row = reinterpret_cast<BFloat16*>(out + r * kGroupRows / 2) + column + v * kWidth;
      for (int64_t t = 0; t < tile; ++t) store(row + t * kGroupRows, load(score + t * kStrip));
      Vec pairs[(kTileRows + 1) / 2];
      for (int64_t t = 0; t < tile; t += 2) {
        const Vec next = t + 1 < tile ? load(score + (t + 1) * kStrip) : Vec{};
        pairs[t / 2] = interleave(load(score + t * kStrip), next);
      }
      keep_pairs(pairs, r / 2, (tile + 1) / 2, column + v * kWidth);
    }
  }
  const Pair* grads_by_row(const Pair*) const { return packed(at_.grads_depth); }
#endif

#if defined(__AMX_BF16__)
  // A hidden row's pairs lie side by side: it is a row of a left operand.
  static constexpr bool kTransposed = false;
  static constexpr int64_t kPairRow = kBackwardItems / 2;
  static constexpr int64_t pairs_at(int64_t row) { return row * kPairRow; }
  void keep_pairs(Vec* pairs, int64_t first, int64_t count, int64_t row) {
    static_assert(kTileRows == 2 * kWidth, "a tile's pairs are a square");
    static_assert(kBackwardItems % kTileRows == 0, "squares fill a hidden row's pairs");
    for (int64_t i = count; i < kWidth; ++i) pairs[i] = Vec{};
    transpose(pairs);
    Pair* out = packed(at_.grads_depth) + pairs_at(row) + first;
    for (int64_t i = 0; i < kWidth; ++i) store_lanes(out + i * kPairRow, pairs[i]);
  }
#else
  static constexpr bool kTransposed = true;
  static constexpr int64_t kPairRow = kGroupRows;
  static constexpr int64_t pairs_at(int64_t row) { return row; }
  void keep_pairs(const Vec* pairs, int64_t first, int64_t count, int64_t row) {
    P* out = packed(at_.grads_depth) + first * kPairRow + row;
    for (int64_t i = 0; i < count; ++i) store_lanes(out + i * kPairRow, pairs[i]);
  }
#endif

  // grad_items (count x size) (+)= grads (count x rows) hidden (rows x size)
  void add_grad_items(int64_t count, int64_t group, int64_t rows) {
    const P* grads = packed(at_.grads);
    const int64_t depth = lanes_of<P>(rows), ld = kGroupRows / kInLane<P>;
    for (int64_t n = 0; n < strips_of(args_.size); ++n) {
      const P* hidden = strip(group_of(packed_.depth, group), depth, n);
      for (int64_t r = 0; r < count; r += kTileRows) {
        product<false>(registers_, smaller(kTileRows, count - r), vecs_of(args_.size - n * kStrip),
                       depth, grads + r * ld, ld, hidden, kStrip,
                       at_.grad_items + r * width_ + n * kStrip, width_, group > 0);
      }
    }
  }

  // grad_hidden (rows x size) (+)= grads^T (rows x count) items (count x size)
  void add_grad_hidden(int64_t count, int64_t group, int64_t rows, bool add) {
    const P* grads = grads_by_row(packed(at_.grads));
    const int64_t depth = lanes_of<P>(count);
    float* out = task_.grad_hidden + group * kGroupRows * width_;
    for (int64_t n = 0; n < strips_of(args_.size); ++n) {
      const P* items = strip(packed(at_.items_depth), depth, n);
      for (int64_t r = 0; r < rows; r += kTileRows) {
        product<kTransposed>(registers_, smaller(kTileRows, rows - r),
                             vecs_of(args_.size - n * kStrip), depth, grads + pairs_at(r), kPairRow,
                             items, kStrip, out + r * width_ + n * kStrip, width_, add);
      }
    }
  }

  const ItemLossBackward& call_;
  const ItemLossArgs& args_;
  const PackedHidden& packed_;
  const ItemLossTask& task_;
  const ItemLossScratch at_;
  const int64_t width_, ld_;  // of a packed row: in elements, in lanes
  const int64_t depth_;
  TileRegisters registers_;
};

template <typename T>
void backward(const ItemLossBackward& call, const PackedHidden& packed, const ItemLossTask& task,
              float* scratch) {
  Backward<T>(call, packed, task, scratch).run();
}

template <typename T>
constexpr ItemLossKernels kernels() {
  return {pack<T>, forward<T>, target_logits<T>, backward<T>};
}

}  // namespace

#if defined(__AVX512BF16__)
const ItemLossKernels kItemLoss[3] = {{}, kernels<BFloat16>(), {}};
#else
const ItemLossKernels kItemLoss[3] = {kernels<float>(), kernels<BFloat16>(), kernels<Half>()};
#endif

}  // namespace SPEEDER_ISA
}  // namespace speeder
