// The forward pass of spae_attention for a few queries a sequence, such as one new token against a
// long cache: one task is a range of keys of one sequence, for all heads. Keys and values are used
// as they lie in memory, because packing one would cost more than using it, and read from one end
// to the other, because reading them is most of the work. Built once for each instruction set.
#include "cpu/spae_prefetch.h"
#include "cpu/spae_softmax.h"
#include "cpu/spae_tasks.h"
#include "cpu/tile_product.h"

namespace speeder {
namespace SPEEDER_ISA {
namespace {

static_assert(kDecodeRows <= kTileRows, "a key head's rows are one tile");

constexpr int kKeysAtOnce = 4;        // times kTileRows rows: as many sums as registers hold
constexpr int64_t kKeysTogether = 8;  // of one head before the next head
constexpr int64_t kKeysAhead = 16;    // how far ahead tokens are fetched into the cache

// parts (kRows x kWidth vectors) += by lane, the products of q (kRows x size) and kKeysAtOnce keys.
template <int kRows, typename T>
void direct_products(const float* q, const T* const* keys, int64_t ahead, int64_t size,
                     Vec* parts) {
  Vec sums[kRows][kKeysAtOnce] = {};
  for (int64_t d = 0; d < size; d += kWidth) {
#pragma GCC unroll 4
    for (int n = 0; n < kKeysAtOnce; ++n) {
      __builtin_prefetch(keys[n] + ahead + d);
      const Vec k = load(keys[n] + d);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) sums[r][n] += k * load(q + r * size + d);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int n = 0; n < kKeysAtOnce; ++n) parts[r * kWidth + n] = sums[r][n];
  }
}

// sums (kRows x size) += weights (kRows x ld) times `count` values, `stride` elements apart.
template <int kRows, typename T>
void direct_sums(const float* weights, int64_t ld, const T* values, int64_t stride, int64_t ahead,
                 int64_t count, int64_t size, float* sums) {
  for (int64_t d = 0; d < size; d += kTileVecs * kWidth) {
    const int64_t vecs = smaller(kTileVecs, (size - d) / kWidth);
    if (vecs < kTileVecs) {
      product<false>(kRows, vecs, count, weights, ld, values + d, stride, sums + d, size, true);
      return;
    }
    Vec total[kRows][kTileVecs];
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kTileVecs; ++v) total[r][v] = load(sums + r * size + d + v * kWidth);
    }
    for (int64_t j = 0; j < count; ++j) {
      const T* value = values + j * stride + d;
#pragma GCC unroll 4
      for (int v = 0; v < kTileVecs; ++v) {
        __builtin_prefetch(value + ahead + v * kWidth);
        const Vec part = load(value + v * kWidth);
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) total[r][v] += part * weights[r * ld + j];
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kTileVecs; ++v) store(sums + r * size + d + v * kWidth, total[r][v]);
    }
  }
}

template <typename T>
struct DirectKernels {
  void (*products)(const float* q, const T* const* keys, int64_t ahead, int64_t size, Vec* parts);
  void (*sums)(const float* weights, int64_t ld, const T* values, int64_t stride, int64_t ahead,
               int64_t count, int64_t size, float* sums);
};

template <typename T>
inline DirectKernels<T> direct_kernels(int64_t rows) {
  static constexpr DirectKernels<T> kByRows[kTileRows] = {
      {direct_products<1, T>, direct_sums<1, T>}, {direct_products<2, T>, direct_sums<2, T>},
      {direct_products<3, T>, direct_sums<3, T>}, {direct_products<4, T>, direct_sums<4, T>},
      {direct_products<5, T>, direct_sums<5, T>}, {direct_products<6, T>, direct_sums<6, T>}};
  return kByRows[rows - 1];
}

template <typename T>
void decode(const AttentionForward& call, const BiasTables& tables, const DecodeTask& task,
            float* scratch) {
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
    const int64_t k_ahead = first + kDecodeKeys < end ? kKeysAhead * args.k.token_stride : 0;
    for (int64_t j = 0; j < count; j += kWidth) {
      for (int64_t i = 0; i < kWidth; i += kKeysAtOnce) {
        for (int64_t h = 0; h < args.kv_heads; ++h) {
          const T* keys_at[kKeysAtOnce];
          for (int n = 0; n < kKeysAtOnce; ++n) {
            keys_at[n] = block_k + smaller(j + i + n, count - 1) * args.k.token_stride +
                         h * args.k.head_stride;
          }
          direct.products(at.q + h * rows * size, keys_at, k_ahead, size,
                          reinterpret_cast<Vec*>(at.parts) + h * rows * kWidth + i);
        }
      }
      for (int64_t r = 0; r < args.kv_heads * rows; ++r) {
        store(at.scores + r * kDecodeKeys + j,
              sums_of(reinterpret_cast<Vec*>(at.parts) + r * kWidth));
      }
    }
    for (int64_t h = 0; h < args.kv_heads; ++h) {
      float* scores = at.scores + h * rows * kDecodeKeys;
      Vec most[kTileRows];
      for (int64_t n = 0; n < rows; ++n) {
        const int64_t seen = clamp(reach + step * (n / group) - first, 0, count);
        most[n] = bias_scores(scores + n * kDecodeKeys, seen, vecs, factor, bias,
                              h * group + n % group, args.rank_q[q0 + n / group]);
      }
      float keep[kTileRows];
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
    const T* block_v = v + first * args.v.token_stride;
    const int64_t v_ahead = first + kDecodeKeys < end ? kKeysAhead * args.v.token_stride : 0;
    for (int64_t j = 0; j < count; j += kKeysTogether) {
      for (int64_t h = 0; h < args.kv_heads; ++h) {
        direct.sums(at.scores + h * rows * kDecodeKeys + j, kDecodeKeys,
                    block_v + j * args.v.token_stride + h * args.v.head_stride, args.v.token_stride,
                    v_ahead, smaller(kKeysTogether, count - j), size, out + h * rows * size);
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
