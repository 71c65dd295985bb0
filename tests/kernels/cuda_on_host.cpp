// Runs the device code of csrc/cuda/pack_tokens.cuh on the host: the same source, one thread of the
// grid after the other. Loaded with ctypes by test_cuda_on_host.py.
#include "cuda/pack_tokens.cuh"

using namespace speeder;

namespace {

template <typename T, int N>
void pack(const void* text, const void* items, const void* prompts, cuda::PackIndices indices,
          void* out, int64_t tokens, int64_t hidden, int64_t threads) {
  const cuda::PackTables<T> tables{static_cast<const T*>(text), static_cast<const T*>(items),
                                   static_cast<const T*>(prompts)};
  for (int64_t thread = threads - 1; thread >= 0; --thread) {
    cuda::pack_tokens<T, N>({thread, threads}, tables, indices, static_cast<T*>(out), tokens,
                            hidden);
  }
}

template <typename T, int N>
void sum(const void* grad, const int64_t* order, const int64_t* starts, void* out, int64_t rows,
         int64_t hidden, int64_t threads) {
  for (int64_t thread = threads - 1; thread >= 0; --thread) {
    cuda::sum_rows<T, N>({thread, threads}, static_cast<const T*>(grad), order, starts,
                         static_cast<T*>(out), rows, hidden);
  }
}

}  // namespace

#define SPEEDER_EXPORT(NAME, T, N)                                                           \
  extern "C" void pack_##NAME(const void* text, const void* items, const void* prompts,      \
                              const int64_t* ids, const int64_t* rows, const int64_t* ranks, \
                              void* out, int64_t tokens, int64_t hidden, int64_t threads) {  \
    pack<T, N>(text, items, prompts, {ids, rows, ranks}, out, tokens, hidden, threads);      \
  }                                                                                          \
  extern "C" void sum_##NAME(const void* grad, const int64_t* order, const int64_t* starts,  \
                             void* out, int64_t rows, int64_t hidden, int64_t threads) {     \
    sum<T, N>(grad, order, starts, out, rows, hidden, threads);                              \
  }

SPEEDER_EXPORT(float32_wide, float, 4)
SPEEDER_EXPORT(float32_narrow, float, 1)
SPEEDER_EXPORT(bfloat16_wide, BFloat16, 8)
SPEEDER_EXPORT(bfloat16_narrow, BFloat16, 1)
SPEEDER_EXPORT(float16_wide, Half, 8)
SPEEDER_EXPORT(float16_narrow, Half, 1)
