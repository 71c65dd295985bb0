// The inner loops of pack_tokens. Built several times: SPEEDER_ISA names the namespace, and the
// compiler's flags say what it may use. Plain loops: the compiler vectorises them.
#include "cpu/pack_tokens_rows.h"

#include "cpu/pack_tokens.h"

namespace speeder {
namespace SPEEDER_ISA {
namespace {

template <typename T>
void pack(const PackArgs& args, int64_t begin, int64_t end) {
  const int64_t hidden = args.hidden;
  const T* text = static_cast<const T*>(args.text_embedding);
  const T* items = static_cast<const T*>(args.item_tokens);
  const T* prompts = static_cast<const T*>(args.position_prompts);
  for (int64_t t = begin; t < end; ++t) {
    T* __restrict out = static_cast<T*>(args.out) + t * hidden;
    const int64_t row = args.item_rows[t];
    if (row >= 0 && args.ranks[t] >= 0) {
      const T* __restrict item = items + row * hidden;
      const T* __restrict prompt = prompts + args.ranks[t] * hidden;
      for (int64_t c = 0; c < hidden; ++c) {
        out[c] = from_float<T>(to_float(item[c]) + to_float(prompt[c]));
      }
    } else {
      const T* source = row >= 0 ? items + row * hidden : text + args.input_ids[t] * hidden;
      __builtin_memcpy(out, source, hidden * sizeof(T));
    }
  }
}

template <typename T>
void sum(const SumArgs& args, int64_t begin, int64_t end) {
  const int64_t hidden = args.hidden;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t row = task % args.rows;
    const int64_t column = task / args.rows * kColumnsPerTask;
    const int64_t left = hidden - column;
    const int64_t columns = left < kColumnsPerTask ? left : kColumnsPerTask;
    float total[kColumnsPerTask] = {};
    for (int64_t n = args.starts[row]; n < args.starts[row + 1]; ++n) {
      const T* __restrict grad = static_cast<const T*>(args.grad) + args.order[n] * hidden + column;
      if (columns == kColumnsPerTask) {
        for (int64_t c = 0; c < kColumnsPerTask; ++c) total[c] += to_float(grad[c]);
      } else {
        for (int64_t c = 0; c < columns; ++c) total[c] += to_float(grad[c]);
      }
    }
    T* out = static_cast<T*>(args.out) + row * hidden + column;
    for (int64_t c = 0; c < columns; ++c) out[c] = from_float<T>(total[c]);
  }
}

}  // namespace

const PackKernels kPackKernels = {
    {pack<float>, pack<BFloat16>, pack<Half>},
    {sum<float>, sum<BFloat16>, sum<Half>},
};

}  // namespace SPEEDER_ISA
}  // namespace speeder
