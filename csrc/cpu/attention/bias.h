// The bias between items: what a query row adds to its scores against one block of keys, and the
// sums that the tables' gradients are. Where the ranks of a vector of keys rise one by one,
// distances fall one by one, and the bias is one plain load from each table. Elsewhere each lane is
// looked up. Included once for each instruction set.
#pragma once

#include "cpu/attention/tasks.h"
#include "cpu/common/vec.h"

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

// What the ranks of a block of keys are.
enum class Ranks {
  kConsecutive,  // they rise one by one through the whole block
  kRising,       // they rise one by one in every vector, between tokens that are no item
  kAny,
};

class KeyBias {
 public:
  KeyBias(const AttentionArgs& args, const BiasTables& tables)
      : tables_(tables),
        any_(args.relative != nullptr || args.absolute != nullptr),
        buckets_(buckets_of(args)),
        positions_(positions_of(args)),
        relative_stride_(relative_stride(args)),
        absolute_stride_(absolute_stride(args)) {}

  // Whether there is any bias at all.
  bool any() const { return any_; }

  Ranks ranks() const { return kind_; }

  // Looks at the ranks of a block of keys; all heads share them.
  void prepare(const int32_t* ranks, int64_t count) {
    if (!any_) return;
    first_ = ranks[0];
    bool consecutive = first_ >= 0;
    for (int64_t j = 1; j < count; ++j) consecutive &= ranks[j] == first_ + j;
    const int64_t end = round_up(count, kWidth);
    for (int64_t j = 0; j < end; ++j) ranks_[j] = j < count ? ranks[j] : -1;
    kind_ = consecutive ? Ranks::kConsecutive : Ranks::kRising;
    if (consecutive) return;
    for (int64_t v = 0; v * kWidth < end; ++v) {
      if (!classify(v)) kind_ = Ranks::kAny;
    }
  }

  // The bias that one query of rank `rank` >= 0 and one head adds to its scores; kRanks is the
  // block's ranks().
  template <Ranks kRanks>
  class Row {
   public:
    Row(const KeyBias& bias, int64_t head, int64_t rank)
        : bias_(bias),
          rank_(rank),
          origin_(kMaxWidth + bias.buckets_ - 1 - rank),
          relative_(bias.tables_.relative + head * bias.relative_stride_),
          absolute_(bias.tables_.absolute + head * bias.absolute_stride_) {}

    // For vector `v` of the block's keys. Past the last key it may be anything.
    Vec operator()(int64_t v) const {
      if (kRanks != Ranks::kAny) {
        const int64_t position = kMaxWidth + smaller(base(v), bias_.positions_);
        return masked(v, load(relative_ + start(v)) + load(absolute_ + position));
      }
      Vec sum = {};
      for (int64_t i = 0; i < kWidth; ++i) {
        const int64_t rank = bias_.ranks_[v * kWidth + i];
        if (rank < 0) continue;
        const int64_t position = smaller(rank, bias_.positions_ - 1);
        sum[i] = relative_[column(v, i)] + absolute_[kMaxWidth + position];
      }
      return sum;
    }

    // Adds the scores' gradient to the relative table's sums; `sums` is the head's row of a table
    // in the layout of BiasTables. Past the last key the gradient is zero.
    void add_gradient(int64_t v, Vec grad, float* sums) const {
      if (kRanks != Ranks::kAny) {
        float* at = sums + start(v);
        store(at, load(at) + masked(v, grad));
        return;
      }
      for (int64_t i = 0; i < kWidth; ++i) {
        if (bias_.ranks_[v * kWidth + i] >= 0) sums[column(v, i)] += grad[i];
      }
    }

   private:
    // Where the first lane reads in a head's row; what lies outside reads the outer buckets.
    int64_t start(int64_t v) const {
      return clamp(origin_ + base(v), 0, kMaxWidth + bias_.buckets_);
    }
    // Rank less lane.
    int64_t base(int64_t v) const {
      return kRanks == Ranks::kConsecutive ? bias_.first_ + v * kWidth : bias_.bases_[v];
    }
    Vec masked(int64_t v, Vec x) const {
      if (kRanks == Ranks::kConsecutive) return x;
      return bitcast<Vec>(bitcast<Ints>(x) & load_ints(bias_.items_ + v * kWidth));
    }
    // Where lane i of vector v reads.
    int64_t column(int64_t v, int64_t i) const {
      const int64_t distance = rank_ - bias_.ranks_[v * kWidth + i];
      return kMaxWidth + bias_.buckets_ - 1 - clamp(distance, 0, bias_.buckets_ - 1);
    }

    const KeyBias& bias_;
    const int64_t rank_, origin_;
    const float *relative_, *absolute_;
  };

  // Vectors of a block of kConsecutive ranks, for one head and one query, whose bias is read from
  // addresses that all rise by one step a vector: kWidth, or 0 where a table has ended and its
  // last bucket goes on.
  struct Span {
    Vec operator()(int64_t v) const {
      return load(relative + v * relative_step) + load(absolute + v * absolute_step);
    }
    const float *relative, *absolute;
    int64_t relative_step, absolute_step;
    int64_t vecs;
  };

  // The span that begins at vector `v`.
  Span span(int64_t head, int64_t rank, int64_t v) const {
    const int64_t last = kMaxWidth + buckets_;  // where the nearest bucket begins to go on
    const int64_t base = first_ + v * kWidth, start = kMaxWidth + buckets_ - 1 - rank + base;
    const float* relative = tables_.relative + head * relative_stride_;
    const float* absolute = tables_.absolute + head * absolute_stride_ + kMaxWidth;
    Span span{relative + clamp(start, 0, last), absolute + smaller(base, positions_), 0, 0,
              INT64_MAX};
    if (start < last) {
      const bool moves = start > 0;
      span.relative_step = moves ? kWidth : 0;
      span.vecs = moves ? (last - start + kWidth - 1) / kWidth : -start / kWidth + 1;
    }
    if (base < positions_) {
      span.absolute_step = kWidth;
      span.vecs = smaller(span.vecs, (positions_ - base + kWidth - 1) / kWidth);
    }
    return span;
  }

  // Adds sums over the queries by key, (count,), to one head's row of the absolute table's sums.
  void add_absolute(int64_t count, const float* by_key, float* sums) const {
    for (int64_t j = 0; j < count; ++j) {
      if (ranks_[j] < 0) continue;
      sums[smaller(ranks_[j], positions_ - 1)] += by_key[j];
    }
  }

 private:
  // Whether the ranks of a vector of keys, where they are items, rise one by one.
  bool classify(int64_t v) {
    bool found = false, rising = true;
    bases_[v] = 0;
    for (int64_t i = 0; i < kWidth; ++i) {
      const int64_t rank = ranks_[v * kWidth + i];
      items_[v * kWidth + i] = rank < 0 ? 0 : -1;
      if (rank < 0) continue;
      if (!found) bases_[v] = rank - i;
      found = true;
      rising &= rank - i == bases_[v];
    }
    return rising;
  }

  const BiasTables tables_;
  const bool any_;
  Ranks kind_ = Ranks::kConsecutive;
  int64_t first_ = 0;  // rank of the first key
  const int64_t buckets_, positions_, relative_stride_, absolute_stride_;
  int32_t ranks_[kMaxKeys];           // -1 past the end
  int32_t items_[kMaxKeys];           // -1 (all bits) for an item, 0 for none
  int64_t bases_[kMaxKeys / kWidth];  // rank less lane, of the items of a rising vector
};

}  // namespace
}  // namespace SPEEDER_ISA
}  // namespace speeder
