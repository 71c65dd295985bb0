// pack_tokens on a GPU: launchers over raw pointers and a stream. No torch and no CUDA header, so
// any host code can call them. The arguments are those of the CPU functions
// (cpu/pack_tokens/pack_tokens.h), all on the current device; `stream` is a cudaStream_t. Each
// returns null, or a message of what went wrong with the launch.
//
// On a CPU, Python checks ids, rows and ranks before a kernel runs. Here they are on the device,
// where only SPEEDER_CHECK=1 has Python read them: a token with one outside of its table gets NaN,
// and nothing is read there. What sum_rows takes is no caller's: `order` and `starts` come of a
// sort and a search in it, and are in bounds whatever the indices were.
#pragma once

#include "cpu/pack_tokens/pack_tokens.h"

namespace speeder {
namespace cuda {

// Rows of the tables.
struct PackTables {
  int64_t vocabulary, items, prompts;
};

const char* pack_tokens(const PackArgs& args, const PackTables& tables, DType dtype, void* stream);
const char* sum_rows(const SumArgs& args, DType dtype, void* stream);

}  // namespace cuda
}  // namespace speeder
