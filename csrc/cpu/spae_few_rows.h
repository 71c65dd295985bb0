// Scores of a few query rows, straight from the keys as they lie in memory: for one new token
// against a long cache, where packing a key would cost more than using it. Included once for each
// instruction set.
#pragma once

#include "cpu/spae_prefetch.h"
#include "cpu/tile_product.h"

namespace speeder {
namespace SPEEDER_ISA {
namespace {

constexpr int kKeysAtOnce = 4;      // times kTileRows rows: as many sums as registers hold
constexpr int64_t kKeysAhead = 64;  // how far ahead keys are fetched into the cache

// scores (kRows x ld) = q (kRows x width) times keys 0 .. count - 1, `stride` elements apart.
// `size` is whole vectors. `values` lie as the keys do: the same tokens of both are fetched into
// the cache.
template <int kRows, typename T>
void direct_scores(const float* q, int64_t width, const T* keys, int64_t stride, const T* values,
                   int64_t value_stride, int64_t count, int64_t left, int64_t size, float* scores,
                   int64_t ld) {
  Vec parts[kRows][kWidth];
  for (int64_t j = 0; j < count; j += kWidth) {
    for (int64_t i = 0; i < kWidth && j + i < count; ++i) {
      fetch(values + (j + i) * value_stride, size * sizeof(T));
      if (j + i + kKeysAhead < left) fetch(keys + (j + i + kKeysAhead) * stride, size * sizeof(T));
    }
    for (int64_t i = 0; i < kWidth; i += kKeysAtOnce) {
      const T* key[kKeysAtOnce];
      for (int n = 0; n < kKeysAtOnce; ++n) key[n] = keys + smaller(j + i + n, count - 1) * stride;
      Vec sums[kRows][kKeysAtOnce] = {};
      for (int64_t d = 0; d < size; d += kWidth) {
#pragma GCC unroll 4
        for (int n = 0; n < kKeysAtOnce; ++n) {
          const Vec k = load(key[n] + d);
#pragma GCC unroll 6
          for (int r = 0; r < kRows; ++r) sums[r][n] += k * load(q + r * width + d);
        }
      }
      for (int r = 0; r < kRows; ++r) {
        for (int n = 0; n < kKeysAtOnce; ++n) parts[r][i + n] = sums[r][n];
      }
    }
    for (int r = 0; r < kRows; ++r) store(scores + r * ld + j, sums_of(parts[r]));
  }
}

template <typename T>
using DirectScores = void (*)(const float* q, int64_t width, const T* keys, int64_t stride,
                              const T* values, int64_t value_stride, int64_t count, int64_t left,
                              int64_t size, float* scores, int64_t ld);

template <typename T>
inline DirectScores<T> direct_scores_of(int64_t rows) {
  static constexpr DirectScores<T> kByRows[kTileRows] = {direct_scores<1, T>, direct_scores<2, T>,
                                                         direct_scores<3, T>, direct_scores<4, T>,
                                                         direct_scores<5, T>, direct_scores<6, T>};
  return kByRows[rows - 1];
}

}  // namespace
}  // namespace SPEEDER_ISA
}  // namespace speeder
