// spae_attention on a GPU: launchers over raw pointers and a stream. No torch and no CUDA header,
// so any host code can call them. What is computed and the arguments are those of the CPU functions
// (cpu/attention/attention.h), all on the current device; `stream` is a cudaStream_t. The results
// are the same to the last bit from run to run.
//
// cu_q and cu_k lie on the device and are not read here, so the caller says how long the longest
// sequence is; longer is allowed and costs empty blocks. They are trusted: Python reads them only
// with SPEEDER_CHECK=1. Ranks are clamped to the tables, so any will do.
#pragma once

#include "cpu/attention/attention.h"

namespace speeder {
namespace cuda {

struct Extents {
  int64_t tokens_q, tokens_k;
  int64_t longest_q, longest_k;  // of a sequence
};

// Floats of working memory that a call needs.
int64_t spae_attention_scratch(const AttentionArgs& args, const Extents& extents);
int64_t spae_attention_backward_scratch(const AttentionBackward& call, const Extents& extents);

// Each returns null, or a message of what is wrong. `dtype`: bfloat16 or float16.
const char* spae_attention(const AttentionForward& call, const Extents& extents, DType dtype,
                           float* scratch, void* stream);
const char* spae_attention_backward(const AttentionBackward& call, const Extents& extents,
                                    DType dtype, float* scratch, void* stream);

}  // namespace cuda
}  // namespace speeder
