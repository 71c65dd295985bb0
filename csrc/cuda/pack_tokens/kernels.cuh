// pack_tokens on a GPU: the device code and its launch, over the device layer.
//
// A warp moves a part of one token's row, 16 bytes a lane and access where rows are whole multiples
// of that, else an element; a lane has its loads on their way together. sum_rows adds a row's
// tokens in the order they are listed, a column in one thread; a row of many tokens is cut into as
// many parts as the block has warps, and the parts are added in order. No atomics, so the gradient
// is the same to the last bit in every run.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/common/device.h"
#include "cuda/common/dispatch.h"
#include "cuda/common/floats.h"
#include "cuda/pack_tokens/pack_tokens.h"

namespace speeder {
namespace cuda {

constexpr int kPackWarps = 8;  // of a block, each with a token or row of its own
constexpr int kPackLoads = 4;  // of a lane at once

template <typename T, int N>
struct PackTokens {
  static constexpr int kThreads = kPackWarps * kWarp, kMinBlocks = 1;
  static constexpr int kColumns = kWarp * kPackLoads;  // vectors of a warp

  PackArgs args;
  PackTables tables;

  SPEEDER_DEVICE void operator()() const {
    using V = Vector<T, N>;
    const int64_t token = int64_t{block_index_x()} * kPackWarps + warp();
    if (token >= args.tokens) return;
    const int64_t row = args.item_rows[token];
    const int64_t rank = row >= 0 ? args.ranks[token] : -1;
    const int64_t id = row >= 0 ? 0 : args.input_ids[token];
    const bool found = row < tables.items && rank < tables.prompts &&
                       (row >= 0 || (id >= 0 && id < tables.vocabulary));
    const V* source = row >= 0 ? at(args.item_tokens, row) : at(args.text_embedding, id);
    const int64_t vectors = args.hidden / N;
    V* out = static_cast<V*>(args.out) + token * vectors;
    const int64_t first = int64_t{block_index_y()} * kColumns + lane();

    V values[kPackLoads];
    SPEEDER_UNROLL
    for (int i = 0; i < kPackLoads; ++i) {
      const int64_t column = first + i * kWarp;
      if (column < vectors) values[i] = found ? read_global(source + column) : not_a_number();
    }
    if (rank >= 0 && found) {
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

  static SPEEDER_DEVICE Vector<T, N> not_a_number() {
    Vector<T, N> value;
    SPEEDER_UNROLL
    for (int c = 0; c < N; ++c) value.at[c] = from_float<T>(NAN);
    return value;
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
  static constexpr int kLong = 64;  // tokens: rows of more are the whole block's work

  struct Memory {
    SPEEDER_HOST_DEVICE constexpr Memory()
        : parts(layout.take<float>(kThreads * N)), long_rows(layout.take<int>(kPackWarps)) {}
    SharedLayout layout;
    Shared<float> parts;    // (warps, lanes, N): what each warp has of a long row
    Shared<int> long_rows;  // (warps,): whether each warp's row is long
  };

  SumArgs args;

  SPEEDER_DEVICE void operator()() const {
    const Memory memory;
    const int64_t first = int64_t{block_index_x()} * kPackWarps, row = first + warp();
    const int64_t begin = row < args.rows ? args.starts[row] : 0;
    const int64_t end = row < args.rows ? args.starts[row + 1] : 0;
    if (lane() == 0) memory.long_rows.set(warp(), end - begin > kLong);
    if (row < args.rows && end - begin <= kLong) store(row, sum(begin, end));
    sync_block();
    SPEEDER_ROLLED
    for (int r = 0; r < kPackWarps; ++r) {
      if (memory.long_rows.get(r)) add_long(memory, first + r, warp() == r);
    }
  }

 private:
  SPEEDER_DEVICE int64_t column() const { return (int64_t{block_index_y()} * kWarp + lane()) * N; }

  // By all warps, of which one writes the row.
  SPEEDER_DEVICE void add_long(const Memory& memory, int64_t row, bool writes) const {
    const int64_t begin = args.starts[row], count = args.starts[row + 1] - begin;
    store_floats(
        memory.parts, thread_index() * N,
        sum(begin + count * warp() / kPackWarps, begin + count * (warp() + 1) / kPackWarps));
    sync_block();
    if (writes) {
      Floats<N> total;
      SPEEDER_ROLLED
      for (int w = 0; w < kPackWarps; ++w) {
        add(total, load_floats<N>(memory.parts, (w * kWarp + lane()) * N));
      }
      store(row, total);
    }
    sync_block();  // until it has read the parts
  }

  // Of the tokens begin .. end - 1 of `order`.
  SPEEDER_DEVICE Floats<N> sum(int64_t begin, int64_t end) const {
    Floats<N> total;
    if (column() >= args.hidden) return total;
    const T* grad = static_cast<const T*>(args.grad) + column();
    int64_t s = begin;
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
    return total;
  }

  SPEEDER_DEVICE void store(int64_t row, const Floats<N>& total) const {
    if (column() >= args.hidden) return;
    store_floats<N>(static_cast<T*>(args.out) + row * args.hidden + column(), total);
  }

  static SPEEDER_DEVICE void add(Floats<N>& total, const Floats<N>& value) {
    SPEEDER_UNROLL
    for (int c = 0; c < N; ++c) total.at[c] += value.at[c];
  }
};

template <typename T, int N, typename Launcher>
void launch_pack(const PackArgs& args, const PackTables& tables, Launcher& launcher) {
  using Kernel = PackTokens<T, N>;
  const int64_t parts = divide_up(args.hidden / N, Kernel::kColumns);
  launcher.launch(Grid{divide_up(args.tokens, kPackWarps), parts, 1, Kernel::kThreads},
                  Kernel{args, tables});
}

template <typename T, int N, typename Launcher>
void launch_sum(const SumArgs& args, Launcher& launcher) {
  using Kernel = SumRows<T, N>;
  const int64_t parts = divide_up(args.hidden / N, kWarp);
  const typename Kernel::Memory memory;
  launcher.launch(
      Grid{divide_up(args.rows, kPackWarps), parts, 1, Kernel::kThreads, memory.layout.bytes()},
      Kernel{args});
}

template <typename Launcher>
void launch_pack_tokens(const PackArgs& args, const PackTables& tables, DType dtype,
                        Launcher& launcher) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int N = kVector<T>;
    const bool vectorized = args.hidden % N == 0 && aligned(args.text_embedding) &&
                            aligned(args.item_tokens) && aligned(args.position_prompts) &&
                            aligned(args.out);
    vectorized ? launch_pack<T, N>(args, tables, launcher)
               : launch_pack<T, 1>(args, tables, launcher);
  });
}

template <typename Launcher>
void launch_sum_rows(const SumArgs& args, DType dtype, Launcher& launcher) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int N = kVector<T>;
    const bool vectorized = args.hidden % N == 0 && aligned(args.grad) && aligned(args.out);
    vectorized ? launch_sum<T, N>(args, launcher) : launch_sum<T, 1>(args, launcher);
  });
}

}  // namespace cuda
}  // namespace speeder
