// pack_tokens on a GPU: the device code and its launch, over the device layer.
//
// A warp moves a part of one token's row, 16 bytes a lane and access where rows are whole multiples
// of that, else an element; a lane has its loads on their way together. sum_rows adds a row's
// tokens in the order they are listed, a column in one thread: no atomics, so the gradient is the
// same to the last bit in every run.
#pragma once

#include <cstdint>

#include "cuda/device.h"
#include "cuda/dispatch.h"
#include "cuda/floats.h"
#include "cuda/pack_tokens.h"

namespace speeder {
namespace cuda {

constexpr int kPackWarps = 8;  // of a block, each with a token or row of its own
constexpr int kPackLoads = 4;  // of a lane at once

template <typename T, int N>
struct PackTokens {
  static constexpr int kThreads = kPackWarps * kWarp, kMinBlocks = 1;
  static constexpr int kColumns = kWarp * kPackLoads;  // vectors of a warp

  PackArgs args;

  SPEEDER_DEVICE void operator()() const {
    using V = Vector<T, N>;
    const int64_t token = int64_t{block_index_x()} * kPackWarps + warp();
    if (token >= args.tokens) return;
    const int64_t row = args.item_rows[token];
    const int64_t rank = row >= 0 ? args.ranks[token] : -1;
    const V* source =
        row >= 0 ? at(args.item_tokens, row) : at(args.text_embedding, args.input_ids[token]);
    const int64_t vectors = args.hidden / N;
    V* out = static_cast<V*>(args.out) + token * vectors;
    const int64_t first = int64_t{block_index_y()} * kColumns + lane();

    V values[kPackLoads];
    SPEEDER_UNROLL
    for (int i = 0; i < kPackLoads; ++i) {
      const int64_t column = first + i * kWarp;
      if (column < vectors) values[i] = read_global(source + column);
    }
    if (rank >= 0) {
      const V* prompt = at(args.position_prompts, rank);
      SPEEDER_UNROLL
      for (int i = 0; i < kPackLoads; ++i) {
        const int64_t column = first + i * kWarp;
        if (column < vectors) add(values[i], read_global(prompt + column));
      }
    }
    SPEEDER_UNROLL
    for (int i = 0; i < kPackLoads; ++i) {
      const int64_t column = first + i * kWarp;
      if (column < vectors) write_global(out + column, values[i]);
    }
  }

 private:
  SPEEDER_DEVICE const Vector<T, N>* at(const void* table, int64_t row) const {
    return static_cast<const Vector<T, N>*>(table) + row * (args.hidden / N);
  }

  static SPEEDER_DEVICE void add(Vector<T, N>& value, const Vector<T, N>& prompt) {
    SPEEDER_UNROLL
    for (int c = 0; c < N; ++c) {
      value.at[c] = from_float<T>(to_float(value.at[c]) + to_float(prompt.at[c]));
    }
  }
};

template <typename T, int N>
struct SumRows {
  static constexpr int kThreads = kPackWarps * kWarp, kMinBlocks = 1;

  SumArgs args;

  SPEEDER_DEVICE void operator()() const {
    const int64_t row = int64_t{block_index_x()} * kPackWarps + warp();
    const int64_t column = (int64_t{block_index_y()} * kWarp + lane()) * N;
    if (row >= args.rows || column >= args.hidden) return;
    const T* grad = static_cast<const T*>(args.grad) + column;
    const int64_t end = args.starts[row + 1];
    int64_t s = args.starts[row];
    Floats<N> total;
    for (; s + kPackLoads <= end; s += kPackLoads) {
      Floats<N> values[kPackLoads];
      SPEEDER_UNROLL
      for (int i = 0; i < kPackLoads; ++i) {
        values[i] = load_floats<N>(grad + args.order[s + i] * args.hidden);
      }
      SPEEDER_UNROLL
      for (int i = 0; i < kPackLoads; ++i) add(total, values[i]);
    }
    for (; s < end; ++s) add(total, load_floats<N>(grad + args.order[s] * args.hidden));
    store_floats<N>(static_cast<T*>(args.out) + row * args.hidden + column, total);
  }

 private:
  static SPEEDER_DEVICE void add(Floats<N>& total, const Floats<N>& value) {
    SPEEDER_UNROLL
    for (int c = 0; c < N; ++c) total.at[c] += value.at[c];
  }
};

template <typename T, int N, typename Launcher>
void launch_pack(const PackArgs& args, Launcher& launcher) {
  using Kernel = PackTokens<T, N>;
  const int64_t parts = divide_up(args.hidden / N, Kernel::kColumns);
  launcher.launch(Grid{divide_up(args.tokens, kPackWarps), parts, 1, Kernel::kThreads},
                  Kernel{args});
}

template <typename T, int N, typename Launcher>
void launch_sum(const SumArgs& args, Launcher& launcher) {
  using Kernel = SumRows<T, N>;
  const int64_t parts = divide_up(args.hidden / N, kWarp);
  launcher.launch(Grid{divide_up(args.rows, kPackWarps), parts, 1, Kernel::kThreads}, Kernel{args});
}

template <typename Launcher>
void launch_pack_tokens(const PackArgs& args, DType dtype, Launcher& launcher) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int N = kVector<T>;
    const bool wide = args.hidden % N == 0 && aligned(args.text_embedding) &&
                      aligned(args.item_tokens) && aligned(args.position_prompts) &&
                      aligned(args.out);
    wide ? launch_pack<T, N>(args, launcher) : launch_pack<T, 1>(args, launcher);
  });
}

template <typename Launcher>
void launch_sum_rows(const SumArgs& args, DType dtype, Launcher& launcher) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int N = kVector<T>;
    const bool wide = args.hidden % N == 0 && aligned(args.grad) && aligned(args.out);
    wide ? launch_sum<T, N>(args, launcher) : launch_sum<T, 1>(args, launcher);
  });
}

}  // namespace cuda
}  // namespace speeder
