// compress_items on a GPU: the backward pass.
//
// An item's experts are read from memory once, here too: with g the gradient of the normalised
// mixture and s the reciprocal of its root mean square, modality m's gate gets
//
//   experts[m] . s (g - normed * mean(g . normed)) = s (experts[m] . g - s along experts[m] .
//   mixed)
//
// whose two products are taken in the pass that makes the mixture. The weight's gradient is summed
// without atomics: by each block over its items, then over the blocks in their order.
#pragma once

#include "cuda/common/sum_parts.cuh"
#include "cuda/compress_items/forward.cuh"

namespace speeder {
namespace cuda {

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
  if (weight) launch_sum_parts(scratch, call.grad_weight, parts, args.size, launcher);
}

// `scratch` has compress_scratch_floats(), or is null where there is no grad_weight.
template <typename Launcher>
void launch_compress_items_backward(const CompressBackward& call, float* scratch, DType dtype,
                                    Launcher& launcher) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    rows_are_aligned<T>(call.args) && aligned(call.grad_tokens) && aligned(call.grad_experts) &&
            aligned(scratch)
        ? launch_compress_backward<T, kVector<T>>(call, scratch, launcher)
        : launch_compress_backward<T, 1>(call, scratch, launcher);
  });
}

}  // namespace cuda
}  // namespace speeder
