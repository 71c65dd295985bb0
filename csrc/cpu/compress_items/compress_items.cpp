// compress_items on a CPU: picks the loops for this processor and shares the items out.
#include "cpu/compress_items/compress_items.h"

#include "cpu/common/isa.h"
#include "cpu/common/run_parts.h"
#include "cpu/compress_items/rows.h"

namespace speeder {
namespace {

constexpr int64_t kElementsPerThread = 1 << 15;  // fewer are not worth waking a thread for

const CompressKernels& kernels(DType dtype) {
  const int type = static_cast<int>(dtype);
#if defined(__x86_64__)
  switch (instruction_set()) {
    case Isa::kAvx512Amx:  // products of matrices are of no use here
    case Isa::kAvx512Bf16:
    case Isa::kAvx512:
      return avx512::kCompress[type];
    case Isa::kAvx2:
      return avx2::kCompress[type];
    case Isa::kPortable:
      break;
  }
#endif
  return portable::kCompress[type];
}

}  // namespace

void compress_items(const CompressForward& call, DType dtype, int64_t,
                    const ParallelFor& parallel_for) {
  const CompressArgs& args = call.args;
  const CompressKernels& kernel = kernels(dtype);
  const int64_t grain = 1 + kElementsPerThread / (args.modalities * args.size);
  parallel_for(args.items, grain, [&](int64_t begin, int64_t end) {
    const Buffer scratch(compress_scratch_floats(args));
    kernel.forward(call, begin, end, scratch.get());
  });
}

void compress_items_backward(const CompressBackward& call, DType dtype, int64_t threads,
                             const ParallelFor& parallel_for) {
  // Each part has its own sum of the weight's gradient; they are added in the order of the parts.
  constexpr int64_t kPartsPerThread = 4;
  const CompressArgs& args = call.args;
  const CompressKernels& kernel = kernels(dtype);
  const int64_t most = args.items * args.modalities * args.size / kElementsPerThread;
  const int64_t parts =
      std::min(args.items, std::clamp<int64_t>(most, 1, threads * kPartsPerThread));
  const int64_t width = compress_padded(args.size);
  const Buffer sums(call.grad_weight ? parts * width : 0);
  if (call.grad_weight) std::fill_n(sums.get(), parts * width, 0.0f);
  run_parts(parts, threads, compress_scratch_floats(args), parallel_for,
            [&](int64_t part, float* scratch) {
              float* const sum = call.grad_weight ? sums.get() + part * width : nullptr;
              kernel.backward(call, args.items * part / parts, args.items * (part + 1) / parts, sum,
                              scratch);
            });
  for (int64_t d = 0; call.grad_weight && d < args.size; ++d) {
    float total = 0.0f;
    for (int64_t part = 0; part < parts; ++part) total += sums.get()[part * width + d];
    call.grad_weight[d] = total;
  }
}

}  // namespace speeder
