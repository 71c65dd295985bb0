// The inner loops of pack_tokens, one set for each instruction set. rows.cpp is built
// once for each, with other compiler flags; pack_tokens.cpp picks a set when the program runs.
#pragma once

#include <cstdint>

namespace speeder {

struct PackArgs;
struct SumArgs;

constexpr int64_t kColumnsPerTask = 64;  // of sum_rows: one task sums this many columns of one row

struct PackKernels {
  // Indexed by DType. Tokens begin .. end - 1.
  void (*pack[3])(const PackArgs& args, int64_t begin, int64_t end);
  // Indexed by DType. Tasks begin .. end - 1; task n is row n % rows, column block n / rows.
  void (*sum[3])(const SumArgs& args, int64_t begin, int64_t end);
};

namespace portable {
extern const PackKernels kPackKernels;
}
namespace avx2 {
extern const PackKernels kPackKernels;
}
namespace avx512 {
extern const PackKernels kPackKernels;
}

}  // namespace speeder
