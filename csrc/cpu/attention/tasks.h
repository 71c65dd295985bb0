// What passes between attention.cpp, which cuts the work into tasks, and the loops that are
// built once for each instruction set: tasks, prepared bias tables, and the layout of scratch
// memory. Everything has internal linkage or is declared only, as in vec.h.
#pragma once

#include <cstdint>

#include "cpu/attention/attention.h"
#include "cpu/common/tile_limits.h"
#include "cpu/common/turns.h"

namespace speeder {

// Tables in units of log2, made once a call where there is any bias; a missing one is zero.
struct BiasTables {
  // (heads, relative_stride): turned round, so that keys of rising rank read rising addresses, with
  // the outer buckets repeated, so that a vector that sticks out reads clamped distances.
  const float* relative;
  // (heads, absolute_stride): after kMaxWidth entries that are never used, with the last repeated.
  const float* absolute;
};

// Queries first .. first + count - 1 of one sequence, for the heads that share one key head.
struct ForwardTask {
  int64_t sequence, kv_head, first, count;
};

// Keys first .. first + count - 1 of one sequence that has few queries, for all heads. Where
// several tasks share the sequence, what each sums goes to memory of its own (rows: key heads x
// queries x heads of a group); null where this one has all keys, and writes the result itself.
struct DecodeTask {
  int64_t sequence, first, count;
  float* sums;   // (rows, size): weights times values
  float* top;    // (rows,): the largest score
  float* total;  // (rows,): sum of weights
};

// Keys first .. first + count - 1 of one sequence and one key head, and the queries that see them.
struct BackwardTask {
  int64_t sequence, kv_head, first, count;
  // Where the queries' gradient is summed, (queries, group, padded size), by tasks that have a
  // block of the sequence's keys each; null where this one has all keys, and writes the gradient
  // itself.
  float* shared_grad_q = nullptr;
  // The tasks add to it in the order of their keys. Each goes over the queries from the last one to
  // the first, and may add to those that the task before is done with: those from *before on (null:
  // it is the first task). It is done itself with those from *done on.
  const int64_t* before = nullptr;
  int64_t* done = nullptr;
};

// One part's sums of the bias tables' gradients; null where not asked for.
struct BiasSums {
  float* relative;  // (heads, relative_stride), as in BiasTables
  float* absolute;  // (heads, positions)
};

// Run one task. `next` is what this thread runs afterwards, or null: its tensors are fetched into
// the cache meanwhile, because a short sequence is computed as quickly as it is read.
using ForwardKernel = void (*)(const AttentionForward& call, const BiasTables& tables,
                               const ForwardTask& task, const ForwardTask* next, float* scratch);
using DecodeKernel = void (*)(const AttentionForward& call, const BiasTables& tables,
                              const DecodeTask& task, const DecodeTask* next, float* scratch);
using BackwardKernel = void (*)(const AttentionBackward& call, const BiasTables& tables,
                                const BackwardTask& task, const BackwardTask* next,
                                const BiasSums& sums, float* scratch);

namespace portable {
extern const DecodeKernel kDecode[3];
extern const ForwardKernel kForward[3];  // indexed by DType
extern const BackwardKernel kBackward[3];
}  // namespace portable
namespace avx2 {
extern const DecodeKernel kDecode[3];
extern const ForwardKernel kForward[3];
extern const BackwardKernel kBackward[3];
}  // namespace avx2
namespace avx512 {
extern const DecodeKernel kDecode[3];
extern const ForwardKernel kForward[3];
extern const BackwardKernel kBackward[3];
}  // namespace avx512
namespace avx512_bf16 {
extern const ForwardKernel kForward[3];  // for bfloat16 alone
extern const BackwardKernel kBackward[3];
}  // namespace avx512_bf16
namespace avx512_amx {
extern const ForwardKernel kForward[3];  // for bfloat16 alone
extern const BackwardKernel kBackward[3];
}  // namespace avx512_amx

namespace {

constexpr int64_t kMaxKeys = 256;       // in a block of keys
constexpr int64_t kDecodeKeys = 128;    // in a block of keys of a DecodeTask
constexpr int64_t kDecodeRows = 6;      // most query rows of one key head in a DecodeTask
constexpr int64_t kForwardRows = 384;   // query rows (positions x heads of a group) of one task
constexpr int64_t kBackwardRows = 128;  // query rows whose scores are held at once
// Floats of the gradient of q that a task sums in its thread's scratch memory, at most.
constexpr int64_t kOwnQueryFloats = 1 << 18;

inline int64_t padded(int64_t n) { return (n + kMaxWidth - 1) / kMaxWidth * kMaxWidth; }

// Keys of a block: fewer where heads are large, so that a packed block stays in the second cache.
inline int64_t key_block(const AttentionArgs& args) {
  const int64_t keys = 16384 / padded(args.size) / 64 * 64;
  return keys > kMaxKeys ? kMaxKeys : keys < 64 ? 64 : keys;
}

// Query positions of a block of about `rows` rows.
inline int64_t query_block(int64_t rows, const AttentionArgs& args) {
  const int64_t group = args.heads / args.kv_heads;
  return group >= rows ? 1 : rows / group;
}

// Entries of the prepared tables: a missing one has a single zero.
inline int64_t buckets_of(const AttentionArgs& args) { return args.relative ? args.buckets : 1; }
inline int64_t positions_of(const AttentionArgs& args) {
  return args.absolute ? args.positions : 1;
}
inline int64_t relative_stride(const AttentionArgs& args) {
  return buckets_of(args) + 2 * kMaxWidth;
}
inline int64_t absolute_stride(const AttentionArgs& args) {
  return positions_of(args) + 2 * kMaxWidth;
}

// Whether a sequence of `queries` queries is left to decode tasks: so few rows that a key is used
// hardly more often than packing it would touch it.
inline bool few_queries(const AttentionArgs& args, int64_t queries) {
  return queries * (args.heads / args.kv_heads) <= kDecodeRows && args.size % kMaxWidth == 0;
}

// Hands out pieces of one allocation; with a null base it only measures.
class Scratch {
 public:
  explicit Scratch(float* base) : base_(base) {}
  float* take(int64_t floats) {
    const int64_t at = used_;
    used_ += padded(floats);
    return base_ == nullptr ? nullptr : base_ + at;
  }
  int64_t used() const { return used_; }

 private:
  float* base_;
  int64_t used_ = 0;
};

struct ForwardScratch {
  ForwardScratch(const AttentionArgs& args, float* base) {
    Scratch scratch(base);
    const int64_t width = padded(args.size), keys = key_block(args);
    const int64_t group = args.heads / args.kv_heads;
    const int64_t rows = query_block(kForwardRows, args) * group;
    q = scratch.take(rows * width);
    out = scratch.take(rows * width);
    top = scratch.take(rows);
    total = scratch.take(rows * kMaxWidth);
    k = scratch.take(width * keys);
    v = scratch.take(keys * width);
    scores = scratch.take(kMostTileRows * keys);
    weights = scratch.take(kMostTileRows * keys);
    floats = scratch.used();
  }
  float* q;        // (rows, width)
  float* out;      // (rows, width): weights times values, not yet divided
  float* top;      // (rows,): largest score so far
  float* total;    // (rows, kMaxWidth): sums of weights so far, by lane
  float* k;        // (width, keys)
  float* v;        // (keys, width)
  float* scores;   // (tile rows, keys)
  float* weights;  // (tile rows, keys)
  int64_t floats;
};

struct DecodeScratch {
  DecodeScratch(const AttentionArgs& args, float* base) {
    Scratch scratch(base);
    const int64_t rows = args.kv_heads * kDecodeRows;
    q = scratch.take(rows * args.size);
    out = scratch.take(rows * args.size);
    top = scratch.take(rows);
    total = scratch.take(rows * kMaxWidth);
    scores = scratch.take(rows * kDecodeKeys);
    floats = scratch.used();
  }
  float* q;       // (rows, size)
  float* out;     // (rows, size): weights times values, not yet divided
  float* top;     // (rows,): largest score so far
  float* total;   // (rows, kMaxWidth): sums of weights so far, by lane
  float* scores;  // (rows, kDecodeKeys)
  int64_t floats;
};

struct BackwardScratch {
  // `queries`: of the longest sequence that one task has alone.
  BackwardScratch(const AttentionArgs& args, int64_t queries, float* base) {
    Scratch scratch(base);
    const int64_t width = padded(args.size), keys = key_block(args);
    const int64_t group = args.heads / args.kv_heads;
    const int64_t rows = query_block(kBackwardRows, args) * group;
    q = scratch.take(rows * width);
    q_depth = scratch.take((rows + 1) / 2 * width);
    grad = scratch.take(rows * width);
    grad_depth = scratch.take((rows + 1) / 2 * width);
    lse = scratch.take(rows);
    delta = scratch.take(rows);
    k = scratch.take(keys * width);
    k_turned = scratch.take(width * keys);
    v_turned = scratch.take(width * keys);
    weights = scratch.take(rows * keys);
    grad_scores = scratch.take(rows * keys);
    tile_weights = scratch.take(kMostTileRows * keys);
    tile_grads = scratch.take(kMostTileRows * keys);
    grad_rows = scratch.take(kMostTileRows * keys);
    grad_k = scratch.take(keys * width);
    grad_v = scratch.take(keys * width);
    absolute_sums = scratch.take(group * keys);
    grad_q = scratch.take(queries * group * width);
    floats = scratch.used();
  }
  float* q;              // (rows, width)
  float* q_depth;        // (rows / 2, width): pairs of rows
  float* grad;           // (rows, width)
  float* grad_depth;     // (rows / 2, width): pairs of rows
  float* lse;            // (rows,): in units of log2
  float* delta;          // (rows,): out . grad
  float* k;              // (keys, width)
  float* k_turned;       // (width, keys)
  float* v_turned;       // (width, keys)
  float* weights;        // (rows, keys)
  float* grad_scores;    // (rows, keys)
  float* tile_weights;   // (tile rows, keys)
  float* tile_grads;     // (tile rows, keys)
  float* grad_rows;      // (tile rows, keys): pairs of keys
  float* grad_k;         // (keys, width)
  float* grad_v;         // (keys, width)
  float* absolute_sums;  // (group, keys)
  float* grad_q;         // (queries, group, width), where one task has all keys
  int64_t floats;
};

}  // namespace
}  // namespace speeder
