// The bias between items, for one block of keys: what a query row adds to its scores, and the sums
// that the tables' gradients are. Where the ranks of a vector of keys rise one by one (tokens that
// are no item may lie between), distances fall one by one, and the bias is one plain load from the
// turned table. Elsewhere each lane is looked up. Included once for each instruction set.
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
  // `absolute` (group, key block) is memory for the absolute bias of each key.
  KeyBias(const AttentionArgs& args, const BiasTables& tables, int64_t kv_head, float* absolute)
      : group_(args.heads / args.kv_heads),
        buckets_(args.buckets),
        positions_(args.positions),
        stride_(relative_stride(args)),
        ld_(key_block(args)),
        absolute_(absolute) {
    const int64_t head = kv_head * group_;
    if (tables.relative != nullptr) relative_table_ = tables.relative + head * stride_;
    if (tables.absolute != nullptr) absolute_table_ = tables.absolute + head * positions_;
  }

  bool any() const { return relative_table_ != nullptr || absolute_table_ != nullptr; }

  // Looks at the ranks of a block of keys.
  void prepare(const int32_t* ranks, int64_t count) {
    if (!any()) return;
    const int64_t end = round_up(count, kWidth);
    for (int64_t j = 0; j < end; ++j) ranks_[j] = j < count ? ranks[j] : -1;
    for (int64_t v = 0; v * kWidth < end; ++v) classify(v);
    if (absolute_table_ == nullptr) return;
    for (int64_t g = 0; g < group_; ++g) {
      const float* table = absolute_table_ + g * positions_;
      float* row = absolute_ + g * ld_;
      for (int64_t j = 0; j < end; ++j) {
        row[j] = ranks_[j] < 0 ? 0.0f : table[smaller(ranks_[j], positions_ - 1)];
      }
    }
  }

  // The bias that one query of rank `rank` >= 0 and head `g` of the group adds to its scores.
  class Row {
   public:
    Row(const KeyBias& bias, int64_t g, int64_t rank)
        : bias_(bias), rank_(rank), origin_(kMaxWidth + bias.buckets_ - 1 - rank) {
      if (bias.relative_table_) relative_ = bias.relative_table_ + g * bias.stride_;
      if (bias.absolute_table_) absolute_ = bias.absolute_ + g * bias.ld_;
    }

    // For vector `v` of the block's keys.
    Vec operator()(int64_t v) const {
      const Kind kind = bias_.kinds_[v];
      if (kind == Kind::kNone) return Vec{};
      const Vec absolute = absolute_ ? load(absolute_ + v * kWidth) : Vec{};
      if (relative_ == nullptr) return absolute;
      if (kind == Kind::kRising) return absolute + bias_.masked(v, load(relative_ + start(v)));
      float values[kWidth];
      for (int64_t i = 0; i < kWidth; ++i) values[i] = relative_[bias_.column(v, i, rank_)];
      return absolute + bias_.masked(v, load(values));
    }

    // Adds the scores' gradient to the relative table's sums; `sums` is the group's part of a table
    // in the layout of BiasTables.
    void add_gradient(int64_t v, Vec grad, float* sums) const {
      const Kind kind = bias_.kinds_[v];
      if (kind == Kind::kNone) return;
      if (kind == Kind::kRising) {
        float* at = sums + start(v);
        store(at, load(at) + bias_.masked(v, grad));
        return;
      }
      for (int64_t i = 0; i < kWidth; ++i) {
        if (bias_.ranks_[v * kWidth + i] >= 0) sums[bias_.column(v, i, rank_)] += grad[i];
      }
    }

   private:
    // Where the first lane reads in a turned row; what lies outside reads the outer buckets.
    int64_t start(int64_t v) const {
      return clamp(origin_ + bias_.bases_[v], 0, kMaxWidth + bias_.buckets_);
    }

    const KeyBias& bias_;
    const int64_t rank_, origin_;
    const float* relative_ = nullptr;
    const float* absolute_ = nullptr;
  };

  // Adds sums over the queries, `by_key` (group, ld), to the absolute table's sums.
  void add_absolute(int64_t count, const float* by_key, int64_t ld, float* sums) const {
    for (int64_t g = 0; g < group_; ++g) {
      for (int64_t j = 0; j < count; ++j) {
        if (ranks_[j] < 0) continue;
        sums[g * positions_ + smaller(ranks_[j], positions_ - 1)] += by_key[g * ld + j];
      }
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

  const int64_t group_, buckets_, positions_, stride_, ld_;
  const float* relative_table_ = nullptr;  // the group's rows
  const float* absolute_table_ = nullptr;
  float* absolute_;
  int32_t ranks_[kMaxKeys];           // -1 past the end
  int32_t items_[kMaxKeys];           // -1 (all bits) for an item, 0 for none
  int64_t bases_[kMaxKeys / kWidth];  // rank less lane, where kRising
  Kind kinds_[kMaxKeys / kWidth];
};

}  // namespace
}  // namespace SPEEDER_ISA
}  // namespace speeder
