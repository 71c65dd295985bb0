// N neighbouring elements of a row as floats, read and written in accesses of up to 16 bytes, for
// which the first must lie right: at a multiple of the access.
#pragma once

#include "cuda/common/device.h"

namespace speeder {
namespace cuda {

template <int N>
struct Floats {
  float at[N] = {};
};

// Elements that go in one access, of N.
template <typename T, int N>
constexpr int kPiece = N < kVector<T> ? N : kVector<T>;

template <int N, typename T>
SPEEDER_DEVICE Floats<N> load_floats(const T* from) {
  constexpr int kP = kPiece<T, N>;
  Floats<N> out;
  SPEEDER_UNROLL
  for (int n = 0; n < N; n += kP) {
    const auto piece = read_global(reinterpret_cast<const Vector<T, kP>*>(from + n));
    SPEEDER_UNROLL
    for (int i = 0; i < kP; ++i) out.at[n + i] = to_float(piece.at[i]);
  }
  return out;
}

template <int N, typename T>
SPEEDER_DEVICE void store_floats(T* to, const Floats<N>& x) {
  constexpr int kP = kPiece<T, N>;
  SPEEDER_UNROLL
  for (int n = 0; n < N; n += kP) {
    Vector<T, kP> piece;
    SPEEDER_UNROLL
    for (int i = 0; i < kP; ++i) piece.at[i] = from_float<T>(x.at[n + i]);
    write_global(reinterpret_cast<Vector<T, kP>*>(to + n), piece);
  }
}

template <int N>
SPEEDER_DEVICE Floats<N> load_floats(Shared<float> from, int first) {
  constexpr int kP = kPiece<float, N>;
  Floats<N> out;
  SPEEDER_UNROLL
  for (int n = 0; n < N; n += kP) {
    const Vector<float, kP> piece = from.get_vector<kP>(first + n);
    SPEEDER_UNROLL
    for (int i = 0; i < kP; ++i) out.at[n + i] = piece.at[i];
  }
  return out;
}

template <int N>
SPEEDER_DEVICE void store_floats(Shared<float> to, int first, const Floats<N>& x) {
  constexpr int kP = kPiece<float, N>;
  SPEEDER_UNROLL
  for (int n = 0; n < N; n += kP) {
    Vector<float, kP> piece;
    SPEEDER_UNROLL
    for (int i = 0; i < kP; ++i) piece.at[i] = x.at[n + i];
    to.set_vector<kP>(first + n, piece);
  }
}

}  // namespace cuda
}  // namespace speeder
