// The loops of compress_items, item by item: what an item's experts give stays in the first cache
// between one loop and the next. Built once for each instruction set.
#include "cpu/compress_items/rows.h"

#include "cpu/common/vec.h"

extern "C" float sqrtf(float);

namespace speeder {
namespace SPEEDER_ISA {
namespace {

constexpr float kLog2E = 1.44269504088896341f;

template <typename T>
class Item {
 public:
  Item(const CompressArgs& args, float* scratch)
      : args_(args),
        mixed(scratch),
        grad(mixed + compress_padded(args.size)),
        gates(grad + compress_padded(args.size)),
        grad_gates(gates + compress_padded(args.modalities)) {}

  // Gates and mixture of item `u`; the reciprocal of its root mean square.
  float mix(int64_t u) {
    const int64_t m0 = u * args_.modalities;
    experts = static_cast<const T*>(args_.experts) + m0 * args_.size;
    present = args_.present + m0;
    soften(args_.logits + m0);
    Vec squares = {};
    for_vectors(args_.size, [&](int64_t d, int64_t count) {
      Vec sum = {};
      for (int64_t m = 0; m < args_.modalities; ++m) {
        if (present[m]) sum += load_row(experts + m * args_.size + d, count) * gates[m];
      }
      store(mixed + d, sum);
      squares += sum * sum;
    });
    return 1.0f / sqrtf(sum(squares) / static_cast<float>(args_.size) + args_.eps);
  }

 private:
  void soften(const float* logits) {
    float top = -kInfinity;
    for (int64_t m = 0; m < args_.modalities; ++m) {
      if (present[m] && logits[m] > top) top = logits[m];
    }
    const float base = top == -kInfinity ? 0.0f : top;
    for (int64_t m = 0; m < args_.modalities; ++m) {
      gates[m] = present[m] ? (logits[m] - base) * kLog2E : -kInfinity;
    }
    Vec total = {};
    for_vectors(args_.modalities, [&](int64_t m, int64_t count) {
      const Ints used = lanes() < static_cast<int32_t>(count);
      const Vec weight = exp2(used ? load(gates + m) : splat(-kInfinity));
      store(gates + m, weight);
      total += weight;
    });
    const float scale = 1.0f / sum(total);
    for (int64_t m = 0; m < args_.modalities; ++m) gates[m] *= scale;
  }

  const CompressArgs& args_;

 public:
  float* const mixed;       // (size,)
  float* const grad;        // (size,): room for a gradient
  float* const gates;       // (modalities,)
  float* const grad_gates;  // (modalities,): room for theirs
  const T* experts = nullptr;
  const bool* present = nullptr;
};

template <bool kStream, typename T>
void forward_rows(const CompressForward& call, int64_t begin, int64_t end, float* scratch) {
  const CompressArgs& args = call.args;
  Item<T> item(args, scratch);
  for (int64_t u = begin; u < end; ++u) {
    const float scale = item.mix(u);
    T* out = static_cast<T*>(call.tokens) + u * args.size;
    for_vectors(args.size, [&](int64_t d, int64_t count) {
      const Vec weight = load_row(args.weight + d, count);
      write<kStream>(out + d, load(item.mixed + d) * scale * weight, count);
    });
    for (int64_t m = 0; m < args.modalities; ++m) {
      call.gates[u * args.modalities + m] = item.gates[m];
    }
  }
  if (kStream) finish_streams();
}

template <typename T>
void forward(const CompressForward& call, int64_t begin, int64_t end, float* scratch) {
  if (streamed<T>(call.tokens, call.args.items, call.args.size)) {
    forward_rows<true, T>(call, begin, end, scratch);
  } else {
    forward_rows<false, T>(call, begin, end, scratch);
  }
}

template <bool kStream, typename T>
void backward_rows(const CompressBackward& call, int64_t begin, int64_t end, float* grad_weight,
                   float* scratch) {
  const CompressArgs& args = call.args;
  Item<T> item(args, scratch);
  const bool through = call.grad_experts != nullptr || call.grad_logits != nullptr;
  for (int64_t u = begin; u < end; ++u) {
    const float scale = item.mix(u);
    const T* grad = static_cast<const T*>(call.grad_tokens) + u * args.size;
    // The gradient of mixed * scale; RMSNorm takes away its part along that vector.
    Vec products = {};
    for_vectors(args.size, [&](int64_t d, int64_t count) {
      const Vec given = load_row(grad + d, count), normed = load(item.mixed + d) * scale;
      const Vec grad_normed = given * load_row(args.weight + d, count);
      if (grad_weight != nullptr) store(grad_weight + d, load(grad_weight + d) + given * normed);
      store(item.grad + d, grad_normed);
      store(item.mixed + d, normed);
      products += grad_normed * normed;
    });
    if (!through) continue;
    const float along = sum(products) / static_cast<float>(args.size);
    for_vectors(args.size, [&](int64_t d, int64_t) {
      const Vec left = load(item.grad + d) - load(item.mixed + d) * along;
      store(item.grad + d, left * scale);
    });

    float total = 0.0f;  // of gates times their gradients
    for (int64_t m = 0; m < args.modalities; ++m) {
      const int64_t at = u * args.modalities + m;
      const T* expert = item.experts + m * args.size;
      T* out = static_cast<T*>(call.grad_experts) + (call.grad_experts ? at * args.size : 0);
      Vec dot = {};
      if (!item.present[m]) {
        if (call.grad_experts != nullptr) __builtin_memset(out, 0, args.size * sizeof(T));
      } else {
        for_vectors(args.size, [&](int64_t d, int64_t count) {
          const Vec grad_mixed = load(item.grad + d);
          dot += load_row(expert + d, count) * grad_mixed;
          if (call.grad_experts != nullptr) {
            write<kStream>(out + d, grad_mixed * item.gates[m], count);
          }
        });
        item.grad_gates[m] = call.grad_gates[at] + sum(dot);
        total += item.gates[m] * item.grad_gates[m];
      }
    }
    for (int64_t m = 0; m < args.modalities && call.grad_logits != nullptr; ++m) {
      const float gradient = item.gates[m] * (item.grad_gates[m] - total);
      call.grad_logits[u * args.modalities + m] = item.present[m] ? gradient : 0.0f;
    }
  }
  if (kStream) finish_streams();
}

template <typename T>
void backward(const CompressBackward& call, int64_t begin, int64_t end, float* grad_weight,
              float* scratch) {
  const CompressArgs& args = call.args;
  if (call.grad_experts &&
      streamed<T>(call.grad_experts, args.items * args.modalities, args.size)) {
    backward_rows<true, T>(call, begin, end, grad_weight, scratch);
  } else {
    backward_rows<false, T>(call, begin, end, grad_weight, scratch);
  }
}

template <typename T>
constexpr CompressKernels kernels() {
  return {forward<T>, backward<T>};
}

}  // namespace

const CompressKernels kCompress[3] = {kernels<float>(), kernels<BFloat16>(), kernels<Half>()};

}  // namespace SPEEDER_ISA
}  // namespace speeder
