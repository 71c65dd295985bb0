// The bias between items: what a query row adds to its scores against one block of keys, and the
// sums that the tables' gradients are. Where the ranks of a vector of keys rise one by one (tokens
// that are no item may lie between), distances fall one by one, and the bias is one plain load from
// each table. Elsewhere each lane is looked up. Included once for each instruction set.
#pragma once

#include "cpu/spae_tasks.h"
#include "cpu/vec.h"

namespace speeder {
namespace SPEEDER_ISA {
namespace {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

inline Ints load_ints(const int32_t* p) {
  Ints out;
  __builtin_memcpy(&out, p, sizeof(out));
  return out;
}

class KeyBias {
 public:
  KeyBias(const AttentionArgs& args, const BiasTables& tables)
      : tables_(tables),
        buckets_(args.buckets),
        positions_(args.positions),
        relative_stride_(relative_stride(args)),
        absolute_stride_(absolute_stride(args)) {}

  bool any() const { return tables_.relative != nullptr || tables_.absolute != nullptr; }

  // Looks at the ranks of a block of keys; all heads share them.
  void prepare(const int32_t* ranks, int64_t count) {
    if (!any()) return;
    const int64_t end = round_up(count, kWidth);
    for (int64_t j = 0; j < end; ++j) ranks_[j] = j < count ? ranks[j] : -1;
    for (int64_t v = 0; v * kWidth < end; ++v) classify(v);
  }

  // The bias that one query of rank `rank` >= 0 and one head adds to its scores.
  class Row {
   public:
    Row(const KeyBias& bias, int64_t head, int64_t rank)
        : bias_(bias), rank_(rank), origin_(kMaxWidth + bias.buckets_ - 1 - rank) {
      const BiasTables& tables = bias.tables_;
      if (tables.relative) relative_ = tables.relative + head * bias.relative_stride_;
      if (tables.absolute) absolute_ = tables.absolute + head * bias.absolute_stride_;
    }

    // For vector `v` of the block's keys.
    Vec operator()(int64_t v) const {
      const Kind kind = bias_.kinds_[v];
      if (kind == Kind::kNone) return Vec{};
      Vec sum = {};
      if (kind == Kind::kRising) {
        if (relative_) sum = load(relative_ + relative_start(v));
        if (absolute_) sum += load(absolute_ + absolute_start(v));
        return bias_.masked(v, sum);
      }
      for (int64_t i = 0; i < kWidth; ++i) {
        const int64_t rank = bias_.ranks_[v * kWidth + i];
        if (rank < 0) continue;
        if (relative_) sum[i] = relative_[bias_.column(v, i, rank_)];
        if (absolute_) sum[i] += absolute_[kMaxWidth + smaller(rank, bias_.positions_ - 1)];
      }
      return sum;
    }

    // Adds the scores' gradient to the relative table's sums; `sums` is the head's row of a table
    // in the layout of BiasTables.
    void add_gradient(int64_t v, Vec grad, float* sums) const {
      const Kind kind = bias_.kinds_[v];
      if (kind == Kind::kNone) return;
      if (kind == Kind::kRising) {
        float* at = sums + relative_start(v);
        store(at, load(at) + bias_.masked(v, grad));
        return;
      }
      for (int64_t i = 0; i < kWidth; ++i) {
        if (bias_.ranks_[v * kWidth + i] >= 0) sums[bias_.column(v, i, rank_)] += grad[i];
      }
    }

   private:
    // Where the first lane reads in a head's row; what lies outside reads the outer buckets.
    int64_t relative_start(int64_t v) const {
      return clamp(origin_ + bias_.bases_[v], 0, kMaxWidth + bias_.buckets_);
    }
    int64_t absolute_start(int64_t v) const {
      return smaller(kMaxWidth + bias_.bases_[v], kMaxWidth + bias_.positions_);
    }

    const KeyBias& bias_;
    const int64_t rank_, origin_;
    const float* relative_ = nullptr;
    const float* absolute_ = nullptr;
  };

  // Adds sums over the queries by key, (count,), to one head's row of the absolute table's sums.
  void add_absolute(int64_t count, const float* by_key, float* sums) const {
    for (int64_t j = 0; j < count; ++j) {
      if (ranks_[j] < 0) continue;
      sums[smaller(ranks_[j], positions_ - 1)] += by_key[j];
    }
  }

 private:
  // What the ranks of a vector of keys are: no items, ranks that rise one by one, or anything.
  enum class Kind : int8_t { kNone, kRising, kAny };

  void classify(int64_t v) {
    Kind kind = Kind::kNone;
    for (int64_t i = 0; i < kWidth; ++i) {
      const int64_t rank = ranks_[v * kWidth + i];
      items_[v * kWidth + i] = rank < 0 ? 0 : -1;
      if (rank < 0) continue;
      if (kind == Kind::kNone) {
        kind = Kind::kRising;
        bases_[v] = rank - i;
      } else if (rank - i != bases_[v]) {
        kind = Kind::kAny;
      }
    }
    kinds_[v] = kind;
  }

  Vec masked(int64_t v, Vec x) const {
    return bitcast<Vec>(bitcast<Ints>(x) & load_ints(items_ + v * kWidth));
  }

  // Where lane i of vector v reads in a turned row.
  int64_t column(int64_t v, int64_t i, int64_t rank) const {
    return kMaxWidth + buckets_ - 1 - clamp(rank - ranks_[v * kWidth + i], 0, buckets_ - 1);
  }

  const BiasTables tables_;
  const int64_t buckets_, positions_, relative_stride_, absolute_stride_;
  int32_t ranks_[kMaxKeys];           // -1 past the end
  int32_t items_[kMaxKeys];           // -1 (all bits) for an item, 0 for none
  int64_t bases_[kMaxKeys / kWidth];  // rank less lane, where kRising
  Kind kinds_[kMaxKeys / kWidth];
};

}  // namespace
}  // namespace SPEEDER_ISA
}  // namespace speeder
