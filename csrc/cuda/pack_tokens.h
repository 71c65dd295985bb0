// pack_tokens on a GPU: launchers over raw pointers and a stream. No torch and no CUDA header, so
// any host code can call them. The arguments are those of the CPU functions (cpu/pack_tokens.h),
// all on the current device; `stream` is a cudaStream_t. Each returns null, or CUDA's message of
// what went wrong with the launch.
#pragma once

#include "cpu/pack_tokens.h"

namespace speeder {
namespace cuda {

const char* pack_tokens(const PackArgs& args, DType dtype, void* stream);
const char* sum_rows(const SumArgs& args, DType dtype, void* stream);

}  // namespace cuda
}  // namespace speeder
