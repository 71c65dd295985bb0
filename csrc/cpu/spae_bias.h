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

  // The bias of vector `v` of the block's keys for a query of rank `rank` >= 0 and head `g` of the
  // group.
  Vec operator()(int64_t v, int64_t g, int64_t rank) const {
    if (!has_items_[v]) return Vec{};
    Vec bias = {};
    if (absolute_table_ != nullptr) bias = load(absolute_ + g * ld_ + v * kWidth);
    if (relative_table_ == nullptr) return bias;
    const float* table = relative_table_ + g * stride_;
    if (rises_[v]) return bias + masked(v, load(table + start(v, rank)));
    float values[kWidth];
    for (int64_t i = 0; i < kWidth; ++i) values[i] = table[column(v * kWidth + i, rank)];
    return bias + masked(v, load(values));
  }

  // Adds the scores' gradient to the relative table's sums, for the same v, g and rank.
  // `sums` is the group's part of a table in the layout of BiasTables.
  void add_relative(int64_t v, int64_t g, int64_t rank, Vec grad, float* sums) const {
    if (!has_items_[v]) return;
    float* row = sums + g * stride_;
    if (rises_[v]) {
      float* at = row + start(v, rank);
      store(at, load(at) + masked(v, grad));
      return;
    }
    for (int64_t i = 0; i < kWidth; ++i) {
      if (ranks_[v * kWidth + i] >= 0) row[column(v * kWidth + i, rank)] += grad[i];
    }
  }

  // Adds sums over the queries, `by_key` (group, key block), to the absolute table's sums.
  void add_absolute(int64_t count, const float* by_key, float* sums) const {
    for (int64_t g = 0; g < group_; ++g) {
      for (int64_t j = 0; j < count; ++j) {
        if (ranks_[j] < 0) continue;
        sums[g * positions_ + smaller(ranks_[j], positions_ - 1)] += by_key[g * ld_ + j];
      }
    }
  }

 private:
  void classify(int64_t v) {
    bool seen = false, rises = true;
    int64_t base = 0;
    for (int64_t i = 0; i < kWidth; ++i) {
      const int64_t rank = ranks_[v * kWidth + i];
      if (rank < 0) continue;
      if (!seen) base = rank - i;
      rises = rises && rank - i == base;
      seen = true;
    }
    has_items_[v] = seen;
    rises_[v] = rises;
    bases_[v] = base;
  }

  Vec masked(int64_t v, Vec x) const { return load_ints(ranks_ + v * kWidth) < 0 ? Vec{} : x; }

  // Where vector v's first lane reads in a turned row; what lies outside reads the outer buckets.
  int64_t start(int64_t v, int64_t rank) const {
    return clamp(kMaxWidth + buckets_ - 1 - (rank - bases_[v]), 0, kMaxWidth + buckets_);
  }

  int64_t column(int64_t j, int64_t rank) const {
    return kMaxWidth + buckets_ - 1 - clamp(rank - ranks_[j], 0, buckets_ - 1);
  }

  const int64_t group_, buckets_, positions_, stride_, ld_;
  const float* relative_table_ = nullptr;  // the group's rows
  const float* absolute_table_ = nullptr;
  float* absolute_;
  int32_t ranks_[kMaxKeys];  // -1 past the end
  int64_t bases_[kMaxKeys / kWidth];
  bool has_items_[kMaxKeys / kWidth];
  bool rises_[kMaxKeys / kWidth];
};

}  // namespace
}  // namespace SPEEDER_ISA
}  // namespace speeder
