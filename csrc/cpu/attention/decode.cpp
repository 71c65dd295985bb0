// The forward pass of spae_attention for a few queries a sequence, such as one new token against a
// long cache: one task is a range of keys of one sequence, for all heads. Keys and values are used
// as they lie in memory, because packing one would cost more than using it, and read from one end
// to the other, because reading them is most of the work. Built once for each instruction set.
#include "cpu/attention/prefetch.h"
#include "cpu/attention/softmax.h"
#include "cpu/attention/tasks.h"
#include "cpu/common/tile_product.h"

namespace speeder {
namespace SPEEDER_ISA {
namespace {

static_assert(kDecodeRows <= kRegisterRows, "a key head's rows are one tile");

constexpr int kKeysAtOnce = 4;         // times kRegisterRows rows: as many sums as registers hold
constexpr int64_t kKeysTogether = 32;  // of one head before the next head
static_assert(kKeysTogether % kWidth == 0 && kWidth % kKeysAtOnce == 0, "whole vectors of keys");

// Rows that are read after those at hand, to be fetched meanwhile: memory delivers most when asked
// for one line after the other, a little ahead.
template <typename T>
struct Coming {
  const T* rows = nullptr;  // null: none
  int64_t stride = 0;

  Coming from(int64_t n) const { return {rows == nullptr ? nullptr : rows + n * stride, stride}; }

  void fetch_row(int64_t n, int64_t size) const {
    if (rows != nullptr) fetch<2>(rows + n * stride, size * static_cast<int64_t>(sizeof(T)));
  }
};

// For one head: its part of the next kKeysTogether tokens of a tensor, the first of which is given.
template <typename T>
inline Coming<T> part_of(const T* tokens, const TokenView& view, int64_t head, int64_t heads,
                         int64_t size) {
  // Where a token's heads lie together, and tokens too, each head takes its share in their order.
  const bool dense = view.head_stride == size && view.token_stride == heads * size;
  if (dense) return {tokens + head * kKeysTogether * size, size};
  return {tokens + head * view.head_stride, view.token_stride};
}

// scores (kRows x kWidth, rows kDecodeKeys apart) = products of q (kRows x size) and kWidth keys,
// `stride` elements apart; past the first `count` anything.
template <int kRows, typename T>
void direct_products(const float* q, const T* keys, int64_t stride, int64_t count, int64_t size,
                     const Coming<T>& coming, float* scores) {
  Vec parts[kRows][kWidth];  // by lane
  for (int64_t i = 0; i < kWidth; i += kKeysAtOnce) {
    const T* at[kKeysAtOnce];
    for (int n = 0; n < kKeysAtOnce; ++n) {
      at[n] = keys + smaller(i + n, count - 1) * stride;
      coming.fetch_row(i + n, size);
    }
    Vec sums[kRows][kKeysAtOnce];
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int n = 0; n < kKeysAtOnce; ++n) sums[r][n] = Vec{};
    }
    for (int64_t d = 0; d < size; d += kWidth) {
#pragma GCC unroll 4
      for (int n = 0; n < kKeysAtOnce; ++n) {
        const Vec k = in_register(load(at[n] + d));
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) sums[r][n] += k * load(q + r * size + d);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int n = 0; n < kKeysAtOnce; ++n) parts[r][i + n] = sums[r][n];
    }
  }
  for (int r = 0; r < kRows; ++r) store(scores + r * kDecodeKeys, sums_of(parts[r]));
}

// sums (kRows x size) += weights (kRows x count, rows kDecodeKeys apart) times `count` values,
// `stride` elements apart.
template <int kRows, typename T>
void direct_sums(const float* weights, const T* values, int64_t stride, int64_t count, int64_t size,
                 const Coming<T>& coming, float* sums) {
  for (int64_t d = 0; d < size; d += kTileVecs * kWidth) {
    const int64_t vecs = smaller(kTileVecs, (size - d) / kWidth);
    if (vecs < kTileVecs) {
      register_product<false>(kRows, vecs, count, weights, kDecodeKeys, values + d, stride,
                              sums + d, size, true);
      return;
    }
    Vec total[kRows][kTileVecs];
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kTileVecs; ++v) total[r][v] = load(sums + r * size + d + v * kWidth);
    }
    for (int64_t j = 0; j < count; ++j) {
      const T* value = values + j * stride + d;
      if (d == 0) coming.fetch_row(j, size);
#pragma GCC unroll 4
      for (int v = 0; v < kTileVecs; ++v) {
        const Vec part = in_register(load(value + v * kWidth));
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) total[r][v] += part * weights[r * kDecodeKeys + j];
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kTileVecs; ++v) store(sums + r * size + d + v * kWidth, total[r][v]);
    }
  }
}

template <typename T>
struct DirectKernels {
  void (*products)(const float* q, const T* keys, int64_t stride, int64_t count, int64_t size,
                   const Coming<T>& coming, float* scores);
  void (*sums)(const float* weights, const T* values, int64_t stride, int64_t count, int64_t size,
               const Coming<T>& coming, float* sums);
};

template <typename T>
inline DirectKernels<T> direct_kernels(int64_t rows) {
  static constexpr DirectKernels<T> kByRows[kRegisterRows] = {
      {direct_products<1, T>, direct_sums<1, T>}, {direct_products<2, T>, direct_sums<2, T>},
      {direct_products<3, T>, direct_sums<3, T>}, {direct_products<4, T>, direct_sums<4, T>},
      {direct_products<5, T>, direct_sums<5, T>}, {direct_products<6, T>, direct_sums<6, T>}};
  return kByRows[rows - 1];
}

// Fetches the queries and ranks of the task to come; returns its first key, or null without one.
template <typename T>
const T* begin_next(const AttentionArgs& args, const DecodeTask* next) {
  if (next == nullptr) return nullptr;
  const int64_t q0 = args.cu_q[next->sequence], queries = args.cu_q[next->sequence + 1] - q0;
  const int64_t k0 = args.cu_k[next->sequence] + next->first;
  Prefetch prefetch;
  prefetch.add<T>(args.q, q0, queries, 0, args.heads, args.size);
  prefetch.advance(queries);
  fetch<3>(args.rank_k + k0, next->count * static_cast<int64_t>(sizeof(int32_t)));
  return static_cast<const T*>(args.k.data) + k0 * args.k.token_stride;
}

template <typename T>
void decode(const AttentionForward& call, const BiasTables& tables, const DecodeTask& task,
            const DecodeTask* next, float* scratch) {
  const AttentionArgs& args = call.args;
  const DecodeScratch at(args, scratch);
  const int64_t group = args.heads / args.kv_heads, size = args.size;
  const int64_t q0 = args.cu_q[task.sequence], queries = args.cu_q[task.sequence + 1] - q0;
  const int64_t k0 = args.cu_k[task.sequence], keys = args.cu_k[task.sequence + 1] - k0;
  const int64_t rows = queries * group;  // of each key head
  const int64_t reach = args.causal ? keys - queries + 1 : keys, step = args.causal ? 1 : 0;
  const float factor = args.scale * kLog2E;

  // Rows of one key head lie together: query by query, head by head of its group.
  const T* q = static_cast<const T*>(args.q.data) + q0 * args.q.token_stride;
  for (int64_t r = 0; r < args.kv_heads * rows; ++r) {
    const int64_t head = r / rows * group + r % group, i = r % rows / group;
    const T* from = q + i * args.q.token_stride + head * args.q.head_stride;
    for (int64_t d = 0; d < size; d += kWidth) store(at.q + r * size + d, load(from + d));
  }
  const bool whole = task.sums == nullptr;
  float* const out = whole ? at.out : task.sums;  // (kv heads x rows, size)
  float* const top = whole ? at.top : task.top;
  for (int64_t r = 0; r < args.kv_heads * rows; ++r) {
    top[r] = -kInfinity;
    store(at.total + r * kWidth, Vec{});
  }
  __builtin_memset(out, 0, args.kv_heads * rows * size * sizeof(float));

  const DirectKernels<T> direct = direct_kernels<T>(rows);
  KeyBias bias(args, tables);
  const T* k = static_cast<const T*>(args.k.data) + k0 * args.k.token_stride;
  const T* v = static_cast<const T*>(args.v.data) + k0 * args.v.token_stride;
  const int64_t end = task.first + task.count;
  for (int64_t first = task.first; first < end; first += kDecodeKeys) {
    const int64_t count = smaller(kDecodeKeys, end - first);
    const int64_t vecs = round_up(count, kWidth) / kWidth;
    bias.prepare(args.rank_k + k0 + first, count);
    // A few tokens at a time, all heads of each: memory is read in order.
    const T* block_k = k + first * args.k.token_stride;
    const T* block_v = v + first * args.v.token_stride;
    for (int64_t j = 0; j < count; j += kKeysTogether) {
      for (int64_t h = 0; h < args.kv_heads; ++h) {
        const T* part = block_k + j * args.k.token_stride + h * args.k.head_stride;
        const Coming<T> coming = j + kKeysTogether < count
                                     ? part_of(block_k + (j + kKeysTogether) * args.k.token_stride,
                                               args.k, h, args.kv_heads, size)
                                     : part_of(block_v, args.v, h, args.kv_heads, size);
        for (int64_t i = 0; i < smaller(kKeysTogether, count - j); i += kWidth) {
          direct.products(at.q + h * rows * size, part + i * args.k.token_stride,
                          args.k.token_stride, count - j - i, size, coming.from(i),
                          at.scores + h * rows * kDecodeKeys + j + i);
        }
      }
    }
    for (int64_t h = 0; h < args.kv_heads; ++h) {
      float* scores = at.scores + h * rows * kDecodeKeys;
      Vec most[kRegisterRows];
      for (int64_t n = 0; n < rows; ++n) {
        const int64_t seen = clamp(reach + step * (n / group) - first, 0, count);
        most[n] = bias_scores(scores + n * kDecodeKeys, seen, vecs, factor, bias,
                              h * group + n % group, args.rank_q[q0 + n / group]);
      }
      float keep[kRegisterRows];
      const int64_t row = h * rows;
      soften(scores, kDecodeKeys, rows, vecs, most, {top + row, at.total + row * kWidth}, scores,
             kDecodeKeys, keep);
      for (int64_t n = row; n < row + rows; ++n) {
        if (keep[n - row] == 1.0f) continue;
        for (int64_t d = n * size; d < (n + 1) * size; d += kWidth) {
          store(out + d, load(out + d) * keep[n - row]);
        }
      }
    }
    const T* coming_k = first + kDecodeKeys < end ? block_k + kDecodeKeys * args.k.token_stride
                                                  : begin_next<T>(args, next);
    for (int64_t j = 0; j < count; j += kKeysTogether) {
      for (int64_t h = 0; h < args.kv_heads; ++h) {
        const T* part = block_v + j * args.v.token_stride + h * args.v.head_stride;
        Coming<T> coming;
        if (j + kKeysTogether < count) {
          coming = part_of(block_v + (j + kKeysTogether) * args.v.token_stride, args.v, h,
                           args.kv_heads, size);
        } else if (coming_k != nullptr) {
          coming = part_of(coming_k, args.k, h, args.kv_heads, size);
        }
        direct.sums(at.scores + h * rows * kDecodeKeys + j, part, args.v.token_stride,
                    smaller(kKeysTogether, count - j), size, coming, out + h * rows * size);
      }
    }
  }
  for (int64_t r = 0; r < args.kv_heads * rows; ++r) {
    const float total = sum(load(at.total + r * kWidth));
    if (whole) {
      const int64_t head = r / rows * group + r % group, i = r % rows / group;
      const int64_t row = (q0 + i) * args.heads + head;
      write_row(static_cast<T*>(call.out) + row * size, call.lse + row, out + r * size, size,
                top[r], total);
    } else {
      task.total[r] = total;
    }
  }
}

}  // namespace

const DecodeKernel kDecode[3] = {decode<float>, decode<BFloat16>, decode<Half>};

}  // namespace SPEEDER_ISA
}  // namespace speeder
