// Tiles of spae_attention: rows of a tensor to shared memory and back, and the two products that
// all passes are made of.
#pragma once

#include <cmath>

#include "cuda/attention/geometry.h"
#include "cuda/common/tile_product.h"

namespace speeder {
namespace cuda {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

SPEEDER_DEVICE float infinity() { return HUGE_VALF; }
SPEEDER_DEVICE int smaller(int a, int b) { return a < b ? a : b; }
SPEEDER_DEVICE int larger(int a, int b) { return a > b ? a : b; }
SPEEDER_DEVICE float larger(float a, float b) { return a > b ? a : b; }
SPEEDER_DEVICE int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

// A row in shared memory is 16 bytes longer than kSize elements, so that eight rows' pieces of 16
// bytes lie in different banks.
template <typename T, int kSize>
constexpr int kStride = kSize + kVector<T>;

// Rows of a tensor in global memory, `stride` elements apart.
template <typename T>
struct Rows {
  T* first;
  int64_t stride;
  SPEEDER_DEVICE T* operator()(int r) const { return first + r * stride; }
};

template <typename T>
SPEEDER_DEVICE Rows<const T> rows_of(const TokenView& view, int64_t token, int64_t head) {
  return {static_cast<const T*>(view.data) + token * view.token_stride + head * view.head_stride,
          view.token_stride};
}

// Starts to copy kRows rows of `size` <= kSize elements; row r begins at row(r). Rows from `count`
// on and elements from `size` on are zero. `vectorized`: every row begins at a multiple of 16
// bytes, and `size` is such a multiple. Thread `thread` of kThreads does its part.
template <typename T, int kRows, int kSize, int kThreads, typename Row>
SPEEDER_DEVICE void load_rows(Shared<T> to, int thread, int count, int size, bool vectorized,
                              const Row& row) {
  constexpr int N = kVector<T>, kPerRow = kSize / N;
  if constexpr (kThreads % kPerRow == 0) {
    // A thread stays in one column, and goes down by the same step each time.
    constexpr int kStep = kThreads / kPerRow;
    if (vectorized) {
      const int first = thread / kPerRow, column = thread % kPerRow * N;
      SPEEDER_UNROLL
      for (int r = 0; r < kRows; r += kStep) {
        if (kRows % kStep != 0 && first + r >= kRows) break;
        const bool valid = first + r < count && column < size;
        copy_async16(to, (first + r) * kStride<T, kSize> + column, row(first + r) + column, valid);
      }
      return;
    }
  }
  SPEEDER_ROLLED
  for (int n = thread; n < kRows * kPerRow; n += kThreads) {
    const int r = n / kPerRow, column = n % kPerRow * N, at = r * kStride<T, kSize> + column;
    if (vectorized) {
      copy_async16(to, at, row(r) + column, r < count && column < size);
      continue;
    }
    Vector<T, N> values;
    for (int i = 0; i < N; ++i) {
      values.at[i] = r < count && column + i < size ? row(r)[column + i] : from_float<T>(0.0f);
    }
    to.set_vector(at, values);
  }
}

// The other way round: the first `count` rows from shared memory to row(r).
template <typename T, int kRows, int kSize, int kThreads, typename Row>
SPEEDER_DEVICE void store_rows(Shared<T> from, int count, int size, bool vectorized,
                               const Row& row) {
  constexpr int N = kVector<T>, kPerRow = kSize / N;
  SPEEDER_ROLLED
  for (int n = thread_index(); n < kRows * kPerRow; n += kThreads) {
    const int r = n / kPerRow, column = n % kPerRow * N;
    if (r >= count || column >= size) continue;
    const Vector<T, N> values = from.template get_vector<N>(r * kStride<T, kSize> + column);
    T* to = row(r) + column;
    if (vectorized) {
      write_global(reinterpret_cast<Vector<T, N>*>(to), values);
    } else {
      for (int i = 0; i < N && column + i < size; ++i) to[i] = values.at[i];
    }
  }
}

// Rows `first` to `rows`, of `width` values each, get `value`; every thread of the grid does its
// part. They are the tokens behind the last sequence, which a batch that is padded to a fixed size
// has.
template <typename T>
SPEEDER_DEVICE void fill_tail(void* to, int64_t first, int64_t rows, int64_t width, float value) {
  const int64_t threads = int64_t{grid_blocks_x()} * block_threads();
  int64_t i = first * width + int64_t{block_index_x()} * block_threads() + thread_index();
  for (; i < rows * width; i += threads) static_cast<T*>(to)[i] = from_float<T>(value);
}

// A warp's rows of sums, times `factor(r, i)`, to shared memory from row `first` on.
template <typename T, int kRowTiles, int kSize, typename Factor>
SPEEDER_DEVICE void keep_sums(Shared<T> to, int first, const SumTile (&sums)[kRowTiles][kSize / 8],
                              const Factor& factor) {
  SPEEDER_UNROLL
  for (int r = 0; r < kRowTiles; ++r) {
    SPEEDER_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = first + 16 * r + SumTile::row(2 * half);
      SPEEDER_UNROLL
      for (int n = 0; n < kSize / 8; ++n) {
        Vector<T, 2> two;
        two.at[0] = from_float<T>(sums[r][n].at[2 * half] * factor(r, half));
        two.at[1] = from_float<T>(sums[r][n].at[2 * half + 1] * factor(r, half));
        to.set_vector(row * kStride<T, kSize> + 8 * n + SumTile::column(0), two);
      }
    }
  }
}

// sums = rows of `a`, from row `first` on, times all kColumns rows of `b`, turned round: dot
// products over kSize.
template <typename T, int kRowTiles, int kColumns, int kSize>
SPEEDER_DEVICE void dot_products(SumTile (&sums)[kRowTiles][kColumns / 8], Shared<T> a, int first,
                                 Shared<T> b) {
  using Product = TileProduct<T>;
  constexpr int S = kStride<T, kSize>;
  SPEEDER_UNROLL
  for (int r = 0; r < kRowTiles; ++r) {
    SPEEDER_UNROLL
    for (int n = 0; n < kColumns / 8; ++n) sums[r][n] = SumTile{};
  }
  SPEEDER_UNROLL
  for (int depth = 0; depth < kSize; depth += 16) {
    typename Product::A rows[kRowTiles];
    SPEEDER_UNROLL
    for (int r = 0; r < kRowTiles; ++r) {
      rows[r] = Product::load_a(a, (first + 16 * r) * S + depth, S);
    }
    SPEEDER_UNROLL
    for (int n = 0; n < kColumns / 8; n += 2) {
      typename Product::B columns[2];
      Product::load_b_transposed_pair(columns, b, 8 * n * S + depth, S);
      SPEEDER_UNROLL
      for (int r = 0; r < kRowTiles; ++r) {
        Product::multiply(sums[r][n], rows[r], columns[0]);
        Product::multiply(sums[r][n + 1], rows[r], columns[1]);
      }
    }
  }
}

// sums += weights (rows x kColumns, in registers) times `b` (kColumns x kSize).
template <typename T, int kRowTiles, int kColumns, int kSize>
SPEEDER_DEVICE void add_weighted(SumTile (&sums)[kRowTiles][kSize / 8],
                                 const SumTile (&weights)[kRowTiles][kColumns / 8], Shared<T> b) {
  using Product = TileProduct<T>;
  constexpr int S = kStride<T, kSize>;
  SPEEDER_UNROLL
  for (int depth = 0; depth < kColumns; depth += 16) {
    typename Product::A rows[kRowTiles];
    SPEEDER_UNROLL
    for (int r = 0; r < kRowTiles; ++r) {
      rows[r] = Product::a_from_sums(weights[r][depth / 8], weights[r][depth / 8 + 1]);
    }
    SPEEDER_UNROLL
    for (int n = 0; n < kSize / 8; n += 2) {
      typename Product::B columns[2];
      Product::load_b_pair(columns, b, depth * S + 8 * n, S);
      SPEEDER_UNROLL
      for (int r = 0; r < kRowTiles; ++r) {
        Product::multiply(sums[r][n], rows[r], columns[0]);
        Product::multiply(sums[r][n + 1], rows[r], columns[1]);
      }
    }
  }
}

}  // namespace cuda
}  // namespace speeder
