// compress_items on a GPU: launchers over raw pointers and a stream. No torch and no CUDA header,
// so any host code can call them. The arguments are those of the CPU functions
// (cpu/compress_items/compress_items.h), all on the current device; `stream` is a cudaStream_t.
// Each returns null, or a message of what went wrong with the launch: CUDA's, or the launcher's
// own.
#pragma once

#include <algorithm>

#include "cpu/compress_items/compress_items.h"

namespace speeder {
namespace cuda {

// Blocks of the backward pass that each sum the weight's gradient over items of their own. Only the
// number of items decides: every GPU gives the same sums.
inline int64_t compress_parts(int64_t items) { return std::min<int64_t>(items, 512); }

// Floats of scratch memory for those sums; null scratch will do where there is no grad_weight.
inline int64_t compress_scratch_floats(const CompressArgs& args) {
  return compress_parts(args.items) * args.size;
}

const char* compress_items(const CompressForward& call, DType dtype, void* stream);
const char* compress_items_backward(const CompressBackward& call, float* scratch, DType dtype,
                                    void* stream);

}  // namespace cuda
}  // namespace speeder
