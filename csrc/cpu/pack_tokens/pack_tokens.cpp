// pack_tokens on a CPU: picks the loops for this processor and shares the work out.
#include "cpu/pack_tokens/pack_tokens.h"

#include "cpu/common/isa.h"
#include "cpu/pack_tokens/rows.h"

namespace speeder {
namespace {

constexpr int64_t kElementsPerThread = 1 << 15;  // fewer are not worth waking a thread for

const PackKernels& kernels() {
#if defined(__x86_64__)
  switch (instruction_set()) {
    case Isa::kAvx512Amx:  // products of matrices are of no use here
    case Isa::kAvx512Bf16:
    case Isa::kAvx512:
      return avx512::kPackKernels;
    case Isa::kAvx2:
      return avx2::kPackKernels;
    case Isa::kPortable:
      break;
  }
#endif
  return portable::kPackKernels;
}

}  // namespace

bool pack_values_fit(const PackArgs& args, int64_t vocabulary, int64_t items, int64_t prompts) {
  bool fits = true;  // no early exit: values that do not fit are rare
  for (int64_t t = 0; t < args.tokens; ++t) {
    const int64_t id = args.input_ids[t], row = args.item_rows[t], rank = args.ranks[t];
    const bool text = (row == -1) & (id >= 0) & (id < vocabulary);
    const bool item = (row >= 0) & (row < items) & (rank >= -1) & (rank < prompts);
    fits &= text | item;
  }
  return fits;
}

void pack_tokens(const PackArgs& args, DType dtype, const ParallelFor& parallel_for) {
  const auto pack = kernels().pack[static_cast<int>(dtype)];
  const int64_t grain = 1 + kElementsPerThread / args.hidden;
  parallel_for(args.tokens, grain, [&](int64_t begin, int64_t end) { pack(args, begin, end); });
}

void sum_rows(const SumArgs& args, DType dtype, const ParallelFor& parallel_for) {
  const auto sum = kernels().sum[static_cast<int>(dtype)];
  const int64_t blocks = (args.hidden + kColumnsPerTask - 1) / kColumnsPerTask;
  parallel_for(args.rows * blocks, kElementsPerThread / kColumnsPerTask,
               [&](int64_t begin, int64_t end) { sum(args, begin, end); });
}

}  // namespace speeder
