// The inner loops of pack_tokens. Built several times: SPEEDER_ISA names the namespace, and the
// compiler's flags say what it may use.
#include "cpu/pack_tokens/rows.h"

#include "cpu/common/vec.h"
#include "cpu/pack_tokens/pack_tokens.h"

namespace speeder {
namespace SPEEDER_ISA {
namespace {

constexpr int64_t kRowsAhead = 8;  // rows lie anywhere: hardware cannot guess the next one

template <typename T>
class Rows {
 public:
  explicit Rows(const PackArgs& args)
      : args_(args),
        text_(static_cast<const T*>(args.text_embedding)),
        items_(static_cast<const T*>(args.item_tokens)),
        prompts_(static_cast<const T*>(args.position_prompts)) {}

  const T* source(int64_t t) const {
    const int64_t row = args_.item_rows[t];
    return row >= 0 ? items_ + row * args_.hidden : text_ + args_.input_ids[t] * args_.hidden;
  }

  // Null where there is none to add.
  const T* prompt(int64_t t) const {
    if (args_.item_rows[t] < 0 || args_.ranks[t] < 0) return nullptr;
    return prompts_ + args_.ranks[t] * args_.hidden;
  }

 private:
  const PackArgs& args_;
  const T *text_, *items_, *prompts_;
};

// Bit by bit: a NaN stays the one it is.
template <bool kStream>
inline void copy_row(char* out, const char* source, const char* coming, int64_t bytes) {
  constexpr int64_t kBytes = sizeof(Vec);
  const int64_t whole = bytes / kBytes * kBytes;
  for (int64_t at = 0; at < whole; at += kBytes) {
    __builtin_prefetch(coming + at);
    const Vec part = load(reinterpret_cast<const float*>(source + at));
    write<kStream>(reinterpret_cast<float*>(out + at), part, kWidth);
  }
  __builtin_memcpy(out + whole, source + whole, bytes - whole);
}

template <bool kStream, typename T>
void pack_rows(const PackArgs& args, int64_t begin, int64_t end) {
  const Rows<T> rows(args);
  const int64_t bytes = args.hidden * static_cast<int64_t>(sizeof(T));
  for (int64_t t = begin; t < end; ++t) {
    T* out = static_cast<T*>(args.out) + t * args.hidden;
    const T* source = rows.source(t);
    const T* coming = rows.source(smaller(t + kRowsAhead, end - 1));
    if (const T* prompt = rows.prompt(t)) {
      for_vectors(args.hidden, [&](int64_t d, int64_t count) {
        __builtin_prefetch(coming + d);
        write<kStream>(out + d, load_row(source + d, count) + load_row(prompt + d, count), count);
      });
    } else {
      copy_row<kStream>(reinterpret_cast<char*>(out), reinterpret_cast<const char*>(source),
                        reinterpret_cast<const char*>(coming), bytes);
    }
  }
  if (kStream) finish_streams();
}

template <typename T>
void pack(const PackArgs& args, int64_t begin, int64_t end) {
  if (streamed<T>(args.out, args.tokens, args.hidden)) {
    pack_rows<true, T>(args, begin, end);
  } else {
    pack_rows<false, T>(args, begin, end);
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
