// pack_tokens on a GPU: the device code. It compiles as plain C++ too, where a test runs it block
// by block and thread by thread; nothing here needs a barrier, so a loop over the grid will do.
//
// A thread moves 16 bytes at a time where rows are whole multiples of 16 bytes, else one element.
// sum_rows adds a row's tokens in the order they are listed, in one thread: no atomics, so the
// gradient is the same to the last bit in every run.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace speeder {
namespace cuda {

// Where one thread stands in a one-dimensional grid.
struct Place {
  int64_t thread;   // over the whole grid
  int64_t threads;  // in the whole grid
};

template <typename T>
struct PackTables {
  const T* text_embedding;
  const T* item_tokens;
  const T* position_prompts;
};

struct PackIndices {
  const int64_t* input_ids;
  const int64_t* item_rows;
  const int64_t* ranks;
};

// N elements that load and store as one access.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T at[N];
};

template <typename T, int N>
SPEEDER_DEVICE void pack_tokens(Place place, const PackTables<T>& tables,
                                const PackIndices& indices, T* out, int64_t tokens,
                                int64_t hidden) {
  using V = Vector<T, N>;
  const int64_t vectors = hidden / N;
  for (int64_t n = place.thread; n < tokens * vectors; n += place.threads) {
    const int64_t token = n / vectors, column = n % vectors;
    const int64_t row = indices.item_rows[token];
    const T* source = row >= 0 ? tables.item_tokens + row * hidden
                               : tables.text_embedding + indices.input_ids[token] * hidden;
    V value = reinterpret_cast<const V*>(source)[column];
    const int64_t rank = row >= 0 ? indices.ranks[token] : -1;
    if (rank >= 0) {
      const T* prompt_row = tables.position_prompts + rank * hidden;
      const V prompt = reinterpret_cast<const V*>(prompt_row)[column];
      for (int c = 0; c < N; ++c) {
        value.at[c] = from_float<T>(to_float(value.at[c]) + to_float(prompt.at[c]));
      }
    }
    reinterpret_cast<V*>(out + token * hidden)[column] = value;
  }
}

template <typename T, int N>
SPEEDER_DEVICE void sum_rows(Place place, const T* grad, const int64_t* order,
                             const int64_t* starts, T* out, int64_t rows, int64_t hidden) {
  using V = Vector<T, N>;
  const int64_t vectors = hidden / N;
  for (int64_t n = place.thread; n < rows * vectors; n += place.threads) {
    const int64_t row = n / vectors, column = n % vectors;
    float total[N] = {};
    for (int64_t s = starts[row]; s < starts[row + 1]; ++s) {
      const V value = reinterpret_cast<const V*>(grad + order[s] * hidden)[column];
      for (int c = 0; c < N; ++c) total[c] += to_float(value.at[c]);
    }
    V sum;
    for (int c = 0; c < N; ++c) sum.at[c] = from_float<T>(total[c]);
    reinterpret_cast<V*>(out + row * hidden)[column] = sum;
  }
}

}  // namespace cuda
}  // namespace speeder
