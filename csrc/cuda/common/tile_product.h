// TileProduct<T>: a warp multiplies a 16 x 16 tile A by a 16 x 8 tile B and adds to a 16 x 8 tile C
// of float32 sums on the tensor cores. T is BFloat16 or Half.
//
// Tiles are loaded from shared memory; `at` is the place of the tile's first element and `stride`
// the distance of its rows there, both in elements and both multiples of 16 bytes:
//
//   load_a              A[m][k] = from[at + m * stride + k]
//   load_a_transposed   A[m][k] = from[at + k * stride + m]
//   load_b              B[k][n] = from[at + k * stride + n]
//   load_b_transposed   B[k][n] = from[at + n * stride + k]
//   load_b_pair, load_b_transposed_pair: two tiles side by side, the second from column 8 on
//
// C.at[i] of a lane is element (row(i), column(i)). a_from_sums rounds two tiles of C, side by
// side, to the tile A of the next product, without shared memory.
#pragma once

#include "cuda/common/device.h"

namespace speeder {
namespace cuda {

// Who holds what in C.
struct SumTile {
  float at[4] = {};

  static SPEEDER_DEVICE int row(int i) { return lane() / 4 + 8 * (i / 2); }
  static SPEEDER_DEVICE int column(int i) { return lane() % 4 * 2 + i % 2; }
};

template <typename T>
struct TileProduct {
  static constexpr int kM = 16, kN = 8, kK = 16;
  using C = SumTile;

  // Two elements in a register. Registers of A hold rows lane / 4 and that + 8, columns
  // 2 (lane % 4), + 1; then the same rows, columns + 8. Those of B: rows 2 (lane % 4), + 1 and
  // these + 8, column lane / 4.
  struct A {
    uint32_t at[4];
  };
  struct B {
    uint32_t at[2];
  };

  static SPEEDER_DEVICE A load_a(Shared<T> from, int at, int stride) {
    A a;
    const int row = lane() % 16, column = lane() / 16 * 8;
    load_matrices<4, false>(a.at, from.range(), bytes(at + row * stride + column));
    return a;
  }

  static SPEEDER_DEVICE A load_a_transposed(Shared<T> from, int at, int stride) {
    A a;
    const int row = lane() % 8 + lane() / 16 * 8, column = lane() / 8 % 2 * 8;
    load_matrices<4, true>(a.at, from.range(), bytes(at + row * stride + column));
    return a;
  }

  static SPEEDER_DEVICE B load_b(Shared<T> from, int at, int stride) {
    B b;
    load_matrices<2, true>(b.at, from.range(), bytes(at + lane() % 16 * stride));
    return b;
  }

  static SPEEDER_DEVICE B load_b_transposed(Shared<T> from, int at, int stride) {
    B b;
    const int row = lane() % 8, column = lane() / 8 % 2 * 8;
    load_matrices<2, false>(b.at, from.range(), bytes(at + row * stride + column));
    return b;
  }

  static SPEEDER_DEVICE void load_b_pair(B (&b)[2], Shared<T> from, int at, int stride) {
    uint32_t four[4];
    const int row = lane() % 16, column = lane() / 16 * 8;
    load_matrices<4, true>(four, from.range(), bytes(at + row * stride + column));
    b[0] = {four[0], four[1]};
    b[1] = {four[2], four[3]};
  }

  static SPEEDER_DEVICE void load_b_transposed_pair(B (&b)[2], Shared<T> from, int at, int stride) {
    uint32_t four[4];
    const int row = lane() % 8 + lane() / 16 * 8, column = lane() / 8 % 2 * 8;
    load_matrices<4, false>(four, from.range(), bytes(at + row * stride + column));
    b[0] = {four[0], four[1]};
    b[1] = {four[2], four[3]};
  }

  static SPEEDER_DEVICE A a_from_sums(const C& left, const C& right) {
    return {{pair(left.at[0], left.at[1]), pair(left.at[2], left.at[3]),
             pair(right.at[0], right.at[1]), pair(right.at[2], right.at[3])}};
  }

  static SPEEDER_DEVICE void multiply(C& c, const A& a, const B& b) {
    multiply_fragments<T>(c.at, a.at, b.at);
  }

 private:
  static SPEEDER_DEVICE int bytes(int elements) { return elements * int(sizeof(T)); }
  static SPEEDER_DEVICE uint32_t pair(float low, float high) { return round_pair<T>(low, high); }
};

}  // namespace cuda
}  // namespace speeder
