// item_cross_entropy on a CPU: shares the work out and adds up what the threads have found. The
// loops over items are in tiles.cpp.
#include "cpu/item_cross_entropy/item_cross_entropy.h"

#include <cmath>
#include <vector>

#include "cpu/common/isa.h"
#include "cpu/common/run_parts.h"
#include "cpu/item_cross_entropy/tiles.h"

namespace speeder {
namespace {

constexpr float kLn2 = 0.693147180559945309f;
constexpr int64_t kSumFloats = int64_t{1}
                               << 24;  // of all sums of the gradient of hidden, or of one

const ItemLossKernels& kernels(DType dtype) {
  const int type = static_cast<int>(dtype);
#if defined(__x86_64__)
  switch (instruction_set()) {
    case Isa::kAvx512Amx:
      if (dtype == DType::kBFloat16) return avx512_amx::kItemLoss[type];
      [[fallthrough]];
    case Isa::kAvx512Bf16:
      if (dtype == DType::kBFloat16) return avx512_bf16::kItemLoss[type];
      [[fallthrough]];
    case Isa::kAvx512:
      return avx512::kItemLoss[type];
    case Isa::kAvx2:
      return avx2::kItemLoss[type];
    case Isa::kPortable:
      break;
  }
#endif
  return portable::kItemLoss[type];
}

// Hidden rows, packed once for all threads.
struct Hidden {
  Hidden(const ItemLossArgs& args, const ItemLossKernels& kernel, bool with_depth,
         const ParallelFor& parallel_for)
      : columns(groups_of(args.rows) * group_floats(args.size)),
        depth(with_depth ? groups_of(args.rows) * group_floats(args.size) : 0),
        packed{columns.get(), with_depth ? depth.get() : nullptr} {
    parallel_for(groups_of(args.rows), 1, [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) kernel.pack(args, packed, group);
    });
  }
  const Buffer columns, depth;
  const PackedHidden packed;
};

// The total of the sums of grad_hidden, in their order.
template <typename T>
void write_hidden(const ItemLossBackward& call, const float* sums, int64_t count, int64_t begin,
                  int64_t end) {
  const int64_t size = call.args.size, width = padded_size(size);
  std::vector<float> total(size);
  for (int64_t n = begin; n < end; ++n) {
    std::copy_n(sums + n * width, size, total.data());
    for (int64_t c = 1; c < count; ++c) {
      const float* more = sums + (c * call.args.rows + n) * width;
      for (int64_t d = 0; d < size; ++d) total[d] += more[d];
    }
    T* out = static_cast<T*>(call.grad_hidden) + n * size;
    for (int64_t d = 0; d < size; ++d) out[d] = from_float<T>(total[d]);
  }
}

void write_hidden(const ItemLossBackward& call, DType dtype, const float* sums, int64_t count,
                  int64_t begin, int64_t end) {
  switch (dtype) {
    case DType::kFloat32:
      return write_hidden<float>(call, sums, count, begin, end);
    case DType::kBFloat16:
      return write_hidden<BFloat16>(call, sums, count, begin, end);
    case DType::kFloat16:
      return write_hidden<Half>(call, sums, count, begin, end);
  }
}

}  // namespace

void item_cross_entropy(const ItemLossForward& call, DType dtype, int64_t threads,
                        const ParallelFor& parallel_for) {
  // Items are cut into so many chunks, or fewer where a chunk would be small: with the groups of
  // rows enough tasks for many threads, and results that do not depend on their number.
  constexpr int64_t kMostChunks = 64, kLeastItems = 1024;
  const ItemLossArgs& args = call.args;
  const ItemLossKernels& kernel = kernels(dtype);
  const Hidden hidden(args, kernel, false, parallel_for);
  const int64_t groups = groups_of(args.rows);
  const int64_t chunks = std::clamp<int64_t>(args.items / kLeastItems, 1, kMostChunks);
  const Buffer tops(groups * chunks * kGroupRows), totals(groups * chunks * kGroupRows);
  run_parts(groups * chunks, threads, ItemLossScratch(args.size, false, nullptr).floats,
            parallel_for, [&](int64_t task, float* scratch) {
              const int64_t group = task / chunks, chunk = task % chunks;
              const int64_t first = args.items * chunk / chunks;
              const int64_t count = args.items * (chunk + 1) / chunks - first;
              kernel.forward(args, hidden.packed, group, first, count,
                             tops.get() + task * kGroupRows, totals.get() + task * kGroupRows,
                             scratch);
            });
  parallel_for(args.rows, 16, [&](int64_t begin, int64_t end) {
    kernel.target_logits(args, begin, end, call.loss);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t at = n / kGroupRows * chunks * kGroupRows + n % kGroupRows;
      float top = -HUGE_VALF, total = 0.0f;
      for (int64_t c = 0; c < chunks; ++c) top = std::max(top, tops.get()[at + c * kGroupRows]);
      const float base = top == -HUGE_VALF ? 0.0f : top;
      for (int64_t c = 0; c < chunks; ++c) {
        const float scale = std::exp2(tops.get()[at + c * kGroupRows] - base);
        total += totals.get()[at + c * kGroupRows] * scale;
      }
      call.lse[n] = (base + std::log2(total)) * kLn2;
      call.loss[n] = call.lse[n] - call.loss[n];
    }
  });
}

void item_cross_entropy_backward(const ItemLossBackward& call, DType dtype, int64_t threads,
                                 const ParallelFor& parallel_for) {
  const ItemLossArgs& args = call.args;
  const ItemLossKernels& kernel = kernels(dtype);
  const Hidden hidden(args, kernel, call.grad_table != nullptr, parallel_for);
  const int64_t tasks = (args.items + kBackwardItems - 1) / kBackwardItems;
  const int64_t groups = groups_of(args.rows);
  // A sum of the gradient of hidden for each thread, unless that becomes too much memory: then
  // tasks that run at once add to one sum in turn, each to another group of rows.
  const int64_t floats = call.grad_hidden ? args.rows * padded_size(args.size) : 0;
  const int64_t most = std::max<int64_t>(1, kSumFloats / std::max<int64_t>(floats, 1));
  const int64_t count = std::min({threads, tasks, most});
  const Buffer sums(count * floats);
  std::vector<int64_t> left(tasks, groups);
  run_parts(tasks, threads, ItemLossScratch(args.size, true, nullptr).floats, parallel_for,
            [&](int64_t n, float* scratch) {
              const int64_t first = n * kBackwardItems;
              const ItemLossTask task{first, std::min(kBackwardItems, args.items - first),
                                      floats ? sums.get() + n % count * floats : nullptr,
                                      n < count ? nullptr : &left[n - count], &left[n]};
              kernel.backward(call, hidden.packed, task, scratch);
            });
  if (call.grad_hidden == nullptr) return;
  parallel_for(args.rows, 16, [&](int64_t begin, int64_t end) {
    write_hidden(call, dtype, sums.get(), count, begin, end);
  });
}

}  // namespace speeder
