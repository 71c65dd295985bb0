// compress_items on a GPU: the device code and its launches, over the device layer.
//
// A block takes an item at a time: a thread has columns of its own, a vector of up to 16 bytes at
// once, so that the mixture stays where it was made until the sums over the whole item are known.
// An item's experts are read from memory once, in the backward pass too: with g the gradient of the
// normalised mixture and s the reciprocal of its root mean square, modality m's gate gets
//
//   experts[m] . s (g - normed * mean(g . normed)) = s (experts[m] . g - s along experts[m] .
//   mixed)
//
// whose two products are taken in the pass that makes the mixture. The weight's gradient is summed
// without atomics: by each block over its items, then over the blocks in their order.
//
// Letters: u items, m modalities, d columns.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/compress_items.h"
#include "cuda/device.h"
#include "cuda/dispatch.h"
#include "cuda/floats.h"

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

// One block for each part: items part, part + parts, ...
template <typename T, int N>
struct CompressItemsBackward {
  static constexpr int kThreads = kCompressThreads, kMinBlocks = 1;

  CompressBackward call;
  float* weight_parts;  // (blocks, size)

  SPEEDER_DEVICE void operator()() const {
    const CompressArgs& args = call.args;
    SharedLayout layout;
    const CompressShared shared(layout, args, block_threads(), call.grad_logits != nullptr,
                                call.grad_weight != nullptr);
    const int modalities = static_cast<int>(args.modalities), size = static_cast<int>(args.size);
    const Shared<float> gates = shared.gates.part(warp() * modalities, modalities);
    for (int d = thread_index(); call.grad_weight != nullptr && d < size; d += block_threads()) {
      shared.weight_sum.set(d, 0.0f);
    }
    for (int64_t u = block_index_x(); u < args.items; u += grid_blocks_x()) {
      sync_block();  // until all have read the sums of the item before
      soften(args, u, gates);
      take_products(shared, gates, u);
      sync_block();
      const float rows = static_cast<float>(size);
      const float scale = 1.0f / sqrtf(sum_of_warps(shared.sums, 0) / rows + args.eps);
      const float along = scale * sum_of_warps(shared.sums, 1) / rows;
      give_columns(shared, gates, u, scale, along);
      if (call.grad_logits != nullptr && warp() == 0) give_logits(shared, gates, u, scale, along);
    }
    for (int d = thread_index() * N; call.grad_weight != nullptr && d < size;
         d += block_threads() * N) {
      store_floats<N>(weight_parts + int64_t{block_index_x()} * size + d,
                      load_floats<N>(shared.weight_sum, d));
    }
  }

 private:
  // The mixture, and the sums over its columns: of squares, of products with the gradient, and of
  // both with each expert.
  SPEEDER_DEVICE void take_products(const CompressShared& shared, Shared<float> gates,
                                    int64_t u) const {
    const CompressArgs& args = call.args;
    const int modalities = static_cast<int>(args.modalities), size = static_cast<int>(args.size);
    const bool* present = args.present + u * modalities;
    const bool with_logits = call.grad_logits != nullptr;
    const T* grads = static_cast<const T*>(call.grad_tokens) + u * args.size;
    for (int n = 0; with_logits && n < 2 * modalities; ++n) {
      shared.products.set(n * block_threads() + thread_index(), 0.0f);
    }
    float squares = 0.0f, along = 0.0f;
    for (int d = thread_index() * N; d < size; d += block_threads() * N) {
      Floats<N> grad = load_floats<N>(grads + d);
      const Floats<N> weight = load_floats<N>(args.weight + d);
      const Floats<N> mixed = mix<T, N>(args, u, gates, d);
      store_floats<N>(shared.mixed, d, mixed);
      SPEEDER_UNROLL
      for (int i = 0; i < N; ++i) {
        grad.at[i] *= weight.at[i];
        squares += mixed.at[i] * mixed.at[i];
        along += grad.at[i] * mixed.at[i];
      }
      for (int m = 0; with_logits && m < modalities; ++m) {
        if (present[m]) add_products(shared, u, m, d, grad, mixed);
      }
    }
    put_warp_sum(shared.sums, 0, squares);
    put_warp_sum(shared.sums, 1, along);
    for (int n = 0; with_logits && n < 2 * modalities; ++n) {
      put_warp_sum(shared.sums, 2 + n, shared.products.get(n * block_threads() + thread_index()));
    }
  }

  // The expert was read a moment ago for the mixture: it comes from the first cache.
  SPEEDER_DEVICE void add_products(const CompressShared& shared, int64_t u, int m, int d,
                                   const Floats<N>& grad, const Floats<N>& mixed) const {
    const CompressArgs& args = call.args;
    const T* from = static_cast<const T*>(args.experts) + (u * args.modalities + m) * args.size;
    const Floats<N> expert = load_floats<N>(from + d);
    float with_grad = 0.0f, with_mixed = 0.0f;
    SPEEDER_UNROLL
    for (int i = 0; i < N; ++i) {
      with_grad += expert.at[i] * grad.at[i];
      with_mixed += expert.at[i] * mixed.at[i];
    }
    const int at = 2 * m * block_threads() + thread_index();
    shared.products.set(at, shared.products.get(at) + with_grad);
    shared.products.set(at + block_threads(),
                        shared.products.get(at + block_threads()) + with_mixed);
  }

  // What has a gradient a column: the experts, and the weight.
  SPEEDER_DEVICE void give_columns(const CompressShared& shared, Shared<float> gates, int64_t u,
                                   float scale, float along) const {
    const CompressArgs& args = call.args;
    const int modalities = static_cast<int>(args.modalities), size = static_cast<int>(args.size);
    const bool* present = args.present + u * modalities;
    const T* grads = static_cast<const T*>(call.grad_tokens) + u * args.size;
    T* out = static_cast<T*>(call.grad_experts);
    for (int d = thread_index() * N; d < size; d += block_threads() * N) {
      const Floats<N> grad = load_floats<N>(grads + d);
      const Floats<N> weight = load_floats<N>(args.weight + d);
      const Floats<N> mixed = load_floats<N>(shared.mixed, d);
      Floats<N> grad_mixed;
      SPEEDER_UNROLL
      for (int i = 0; i < N; ++i) {
        const float normed = mixed.at[i] * scale;
        grad_mixed.at[i] = scale * (grad.at[i] * weight.at[i] - normed * along);
      }
      if (call.grad_weight != nullptr) {
        Floats<N> sum = load_floats<N>(shared.weight_sum, d);
        SPEEDER_UNROLL
        for (int i = 0; i < N; ++i) sum.at[i] += grad.at[i] * (mixed.at[i] * scale);
        store_floats<N>(shared.weight_sum, d, sum);
      }
      for (int m = 0; out != nullptr && m < modalities; ++m) {
        Floats<N> grad_expert;
        const float gate = present[m] ? gates.get(m) : 0.0f;
        SPEEDER_UNROLL
        for (int i = 0; i < N; ++i) grad_expert.at[i] = present[m] ? grad_mixed.at[i] * gate : 0.0f;
        store_floats<N>(out + (u * modalities + m) * args.size + d, grad_expert);
      }
    }
  }

  // By the first warp: the gates' gradients go back through the softmax.
  SPEEDER_DEVICE void give_logits(const CompressShared& shared, Shared<float> gates, int64_t u,
                                  float scale, float along) const {
    const int modalities = static_cast<int>(call.args.modalities);
    const bool* present = call.args.present + u * modalities;
    const auto grad_gate = [&](int m) {
      const float with_grad = sum_of_warps(shared.sums, 2 + 2 * m);
      const float with_mixed = sum_of_warps(shared.sums, 3 + 2 * m);
      return call.grad_gates[u * modalities + m] + scale * (with_grad - scale * along * with_mixed);
    };
    float total = 0.0f;  // of gates times their gradients
    for (int m = lane(); m < modalities; m += kWarp) {
      if (present[m]) total += gates.get(m) * grad_gate(m);
    }
    total = warp_sum(total);
    for (int m = lane(); m < modalities; m += kWarp) {
      const float gradient = present[m] ? gates.get(m) * (grad_gate(m) - total) : 0.0f;
      call.grad_logits[u * modalities + m] = gradient;
    }
  }
};

// The sum of the blocks' parts, 32 columns a block: every warp adds some of the parts, the first
// one what the warps have.
struct SumWeightParts {
  static constexpr int kThreads = 1024, kMinBlocks = 1;
  static constexpr int kWarps = kThreads / kWarp;

  const float* weight_parts;  // (parts, size)
  float* grad_weight;         // (size,)
  int64_t parts;
  int64_t size;

  SPEEDER_DEVICE void operator()() const {
    SharedLayout layout;
    const Shared<float> sums = layout.take<float>(kThreads);
    const int64_t d = int64_t{block_index_x()} * kWarp + lane();
    float total = 0.0f;
    if (d < size) {
      for (int64_t part = warp(); part < parts; part += kWarps) {
        total += weight_parts[part * size + d];
      }
    }
    sums.set(thread_index(), total);
    sync_block();
    if (warp() > 0 || d >= size) return;
    float whole = 0.0f;
    for (int w = 0; w < kWarps; ++w) whole += sums.get(w * kWarp + lane());
    grad_weight[d] = whole;
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

template <typename T, int N, typename Launcher>
void launch_compress_backward(const CompressBackward& call, float* scratch, Launcher& launcher) {
  const CompressArgs& args = call.args;
  const bool weight = call.grad_weight != nullptr;
  const int threads = compress_threads<N>(args.size);
  const int64_t parts = weight ? compress_parts(args.items) : args.items;
  SharedLayout layout;
  CompressShared(layout, args, threads, call.grad_logits != nullptr, weight);
  launcher.launch(Grid{parts, 1, 1, threads, layout.bytes()},
                  CompressItemsBackward<T, N>{call, scratch});
  if (!weight) return;
  using Sum = SumWeightParts;
  launcher.launch(Grid{divide_up(args.size, kWarp), 1, 1, Sum::kThreads, Sum::kThreads * 4},
                  Sum{scratch, call.grad_weight, parts, args.size});
}

template <typename T>
bool wide(const CompressArgs& args) {
  return args.size % kVector<T> == 0 && aligned(args.experts) && aligned(args.weight);
}

template <typename Launcher>
void launch_compress_items(const CompressForward& call, DType dtype, Launcher& launcher) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    wide<T>(call.args) && aligned(call.tokens) ? launch_compress<T, kVector<T>>(call, launcher)
                                               : launch_compress<T, 1>(call, launcher);
  });
}

// `scratch` has compress_scratch_floats(), or is null where there is no grad_weight.
template <typename Launcher>
void launch_compress_items_backward(const CompressBackward& call, float* scratch, DType dtype,
                                    Launcher& launcher) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    wide<T>(call.args) && aligned(call.grad_tokens) && aligned(call.grad_experts) &&
            aligned(scratch)
        ? launch_compress_backward<T, kVector<T>>(call, scratch, launcher)
        : launch_compress_backward<T, 1>(call, scratch, launcher);
  });
}

}  // namespace cuda
}  // namespace speeder
