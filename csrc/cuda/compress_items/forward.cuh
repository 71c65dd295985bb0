// compress_items on a GPU: the device code and its launch, over the device layer; here the forward
// pass, and what it shares with the backward one.
//
// A block takes an item at a time: a thread has columns of its own, a vector of up to 16 bytes at
// once, so that the mixture stays where it was made until the sums over the whole item are known.
//
// Letters: u items, m modalities, d columns.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/common/device.h"
#include "cuda/common/dispatch.h"
#include "cuda/common/floats.h"
#include "cuda/compress_items/compress_items.h"

namespace speeder {
namespace cuda {

constexpr int kCompressThreads = 256;

// Shared memory of a block. Every warp has gates of its own, so that they need no barrier of the
// block.
struct CompressShared {
  Shared<float> gates;       // (warps, modalities)
  Shared<float> mixed;       // (size,)
  Shared<float> sums;        // (2 + 2 modalities, warps): what each warp adds to the item's sums
  Shared<float> products;    // (2 modalities, threads): a thread's part of each gate's products
  Shared<float> weight_sum;  // (size,): of the block's items

  SPEEDER_HOST_DEVICE CompressShared(SharedLayout& layout, const CompressArgs& args, int threads,
                                     bool gate_products, bool weight) {
    const int64_t warps = threads / kWarp, products_count = gate_products ? 2 * args.modalities : 0;
    gates = layout.take<float>(warps * args.modalities);
    mixed = layout.take<float>(args.size);
    sums = layout.take<float>((2 + products_count) * warps);
    products = layout.take<float>(products_count * threads);
    weight_sum = layout.take<float>(weight ? args.size : 0);
  }
};

// The softmax of item u's logits over the modalities that are present, by one warp to `gates`.
SPEEDER_DEVICE void soften(const CompressArgs& args, int64_t u, Shared<float> gates) {
  const int modalities = static_cast<int>(args.modalities);
  const float* logits = args.logits + u * args.modalities;
  const bool* present = args.present + u * args.modalities;
  float top = -INFINITY;
  for (int m = lane(); m < modalities; m += kWarp) {
    if (present[m] && logits[m] > top) top = logits[m];
  }
  top = warp_max(top);
  const float base = top == -INFINITY ? 0.0f : top;
  float total = 0.0f;
  for (int m = lane(); m < modalities; m += kWarp) {
    if (present[m]) total += expf(logits[m] - base);
  }
  const float scale = 1.0f / warp_sum(total);
  sync_warp();  // until all have read the item before
  for (int m = lane(); m < modalities; m += kWarp) {
    gates.set(m, present[m] ? expf(logits[m] - base) * scale : 0.0f);
  }
  sync_warp();
}

// The sum over the block's warps of what each has put in `sums`; the same bits in every thread.
SPEEDER_DEVICE float sum_of_warps(Shared<float> sums, int which) {
  const int warps = block_threads() / kWarp;
  float total = 0.0f;
  for (int w = 0; w < warps; ++w) total += sums.get(which * warps + w);
  return total;
}

SPEEDER_DEVICE void put_warp_sum(Shared<float> sums, int which, float x) {
  const float total = warp_sum(x);
  if (lane() == 0) sums.set(which * (block_threads() / kWarp) + warp(), total);
}

// Columns d .. d + N - 1 of item u's mixture.
template <typename T, int N>
SPEEDER_DEVICE Floats<N> mix(const CompressArgs& args, int64_t u, Shared<float> gates, int d) {
  const bool* present = args.present + u * args.modalities;
  const T* experts = static_cast<const T*>(args.experts) + u * args.modalities * args.size + d;
  Floats<N> mixed;
  for (int m = 0; m < args.modalities; ++m) {
    if (!present[m]) continue;
    const float gate = gates.get(m);
    const Floats<N> expert = load_floats<N>(experts + m * args.size);
    SPEEDER_UNROLL
    for (int i = 0; i < N; ++i) mixed.at[i] += expert.at[i] * gate;
  }
  return mixed;
}

template <typename T, int N>
struct CompressItems {
  static constexpr int kThreads = kCompressThreads, kMinBlocks = 1;

  CompressForward call;

  SPEEDER_DEVICE void operator()() const {
    const CompressArgs& args = call.args;
    SharedLayout layout;
    const CompressShared shared(layout, args, block_threads(), false, false);
    const int modalities = static_cast<int>(args.modalities), size = static_cast<int>(args.size);
    const int64_t u = block_index_x();
    const Shared<float> gates = shared.gates.part(warp() * modalities, modalities);
    soften(args, u, gates);

    float squares = 0.0f;
    for (int d = thread_index() * N; d < size; d += block_threads() * N) {
      const Floats<N> mixed = mix<T, N>(args, u, gates, d);
      store_floats<N>(shared.mixed, d, mixed);
      SPEEDER_UNROLL
      for (int i = 0; i < N; ++i) squares += mixed.at[i] * mixed.at[i];
    }
    put_warp_sum(shared.sums, 0, squares);
    sync_block();
    const float scale =
        1.0f / sqrtf(sum_of_warps(shared.sums, 0) / static_cast<float>(size) + args.eps);

    T* tokens = static_cast<T*>(call.tokens) + u * args.size;
    for (int d = thread_index() * N; d < size; d += block_threads() * N) {
      Floats<N> mixed = load_floats<N>(shared.mixed, d);
      const Floats<N> weight = load_floats<N>(args.weight + d);
      SPEEDER_UNROLL
      for (int i = 0; i < N; ++i) mixed.at[i] *= scale * weight.at[i];
      store_floats<N>(tokens + d, mixed);
    }
    for (int m = thread_index(); m < modalities; m += block_threads()) {
      call.gates[u * modalities + m] = gates.get(m);
    }
  }
};

// As many threads as a row has vectors, in whole warps.
template <int N>
int compress_threads(int64_t size) {
  return static_cast<int>(std::min<int64_t>(divide_up(size / N, kWarp) * kWarp, kCompressThreads));
}

template <typename T, int N, typename Launcher>
void launch_compress(const CompressForward& call, Launcher& launcher) {
  const int threads = compress_threads<N>(call.args.size);
  SharedLayout layout;
  CompressShared(layout, call.args, threads, false, false);
  launcher.launch(Grid{call.args.items, 1, 1, threads, layout.bytes()}, CompressItems<T, N>{call});
}

template <typename T>
bool rows_are_aligned(const CompressArgs& args) {
  return args.size % kVector<T> == 0 && aligned(args.experts) && aligned(args.weight);
}

template <typename Launcher>
void launch_compress_items(const CompressForward& call, DType dtype, Launcher& launcher) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    rows_are_aligned<T>(call.args) && aligned(call.tokens)
        ? launch_compress<T, kVector<T>>(call, launcher)
        : launch_compress<T, 1>(call, launcher);
  });
}

}  // namespace cuda
}  // namespace speeder
