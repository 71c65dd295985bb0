// TileProduct<T>: a warp multiplies a 16 x 16 tile A by a 16 x 8 tile B and adds to a 16 x 8 tile C
// of float32 sums. For BFloat16 and Half on the tensor cores; for float with a multiplication and
// an addition each, in the same interface, with the same layout of C.
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

// Who holds what in C, for every T.
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

template <>
struct TileProduct<float> {
  static constexpr int kM = 16, kN = 8, kK = 16;
  using C = SumTile;

  // The two rows of A and the two columns of B that meet in the lane's part of C, whole.
  struct A {
    float at[2][kK];
  };
  struct B {
    float at[2][kK];
  };

  static SPEEDER_DEVICE A load_a(Shared<float> from, int at, int stride) {
    A a;
    load_rows(a.at, from, at + lane() / 4 * stride, 8 * stride);
    return a;
  }

  static SPEEDER_DEVICE A load_a_transposed(Shared<float> from, int at, int stride) {
    A a;
    SPEEDER_UNROLL
    for (int k = 0; k < kK; ++k) {
      a.at[0][k] = from.get(at + k * stride + lane() / 4);
      a.at[1][k] = from.get(at + k * stride + lane() / 4 + 8);
    }
    return a;
  }

  static SPEEDER_DEVICE B load_b(Shared<float> from, int at, int stride) {
    B b;
    SPEEDER_UNROLL
    for (int k = 0; k < kK; ++k) {
      const Vector<float, 2> two = from.get_vector<2>(at + k * stride + lane() % 4 * 2);
      b.at[0][k] = two.at[0];
      b.at[1][k] = two.at[1];
    }
    return b;
  }

  static SPEEDER_DEVICE B load_b_transposed(Shared<float> from, int at, int stride) {
    B b;
    load_rows(b.at, from, at + lane() % 4 * 2 * stride, stride);
    return b;
  }

  static SPEEDER_DEVICE void load_b_pair(B (&b)[2], Shared<float> from, int at, int stride) {
    b[0] = load_b(from, at, stride);
    b[1] = load_b(from, at + kN, stride);
  }

  static SPEEDER_DEVICE void load_b_transposed_pair(B (&b)[2], Shared<float> from, int at,
                                                    int stride) {
    b[0] = load_b_transposed(from, at, stride);
    b[1] = load_b_transposed(from, at + kN * stride, stride);
  }

  // The four lanes that hold a row's sums hand them to each other.
  static SPEEDER_DEVICE A a_from_sums(const C& left, const C& right) {
    A a;
    SPEEDER_UNROLL
    for (int source = 0; source < 4; ++source) {
      const int from = lane() / 4 * 4 + source;
      SPEEDER_UNROLL
      for (int i = 0; i < 4; ++i) {
        a.at[i / 2][source * 2 + i % 2] = shuffle(left.at[i], from);
        a.at[i / 2][kN + source * 2 + i % 2] = shuffle(right.at[i], from);
      }
    }
    return a;
  }

  static SPEEDER_DEVICE void multiply(C& c, const A& a, const B& b) {
    SPEEDER_UNROLL
    for (int k = 0; k < kK; ++k) {
      SPEEDER_UNROLL
      for (int i = 0; i < 4; ++i) c.at[i] += a.at[i / 2][k] * b.at[i % 2][k];
    }
  }

 private:
  static SPEEDER_DEVICE void load_rows(float (&rows)[2][kK], Shared<float> from, int at, int step) {
    SPEEDER_UNROLL
    for (int r = 0; r < 2; ++r) {
      SPEEDER_UNROLL
      for (int k = 0; k < kK; k += 4) {
        const Vector<float, 4> four = from.get_vector<4>(at + r * step + k);
        SPEEDER_UNROLL
        for (int i = 0; i < 4; ++i) rows[r][k + i] = four.at[i];
      }
    }
  }
};

}  // namespace cuda
}  // namespace speeder
