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

// Sums of the threads' parts of grad_hidden, in the order of the parts.
template <typename T>
void write_hidden(const ItemLossBackward& call, const std::vector<ItemLossPart>& parts,
                  int64_t begin, int64_t end) {
  const int64_t size = call.args.size, width = padded_size(size);
  std::vector<float> sums(size);
  for (int64_t n = begin; n < end; ++n) {
    std::copy_n(parts[0].grad_hidden + n * width, size, sums.data());
    for (size_t p = 1; p < parts.size(); ++p) {
      const float* more = parts[p].grad_hidden + n * width;
      for (int64_t d = 0; d < size; ++d) sums[d] += more[d];
    }
    T* out = static_cast<T*>(call.grad_hidden) + n * size;
    for (int64_t d = 0; d < size; ++d) out[d] = from_float<T>(sums[d]);
  }
}

void write_hidden(const ItemLossBackward& call, DType dtype, const std::vector<ItemLossPart>& parts,
                  int64_t begin, int64_t end) {
  switch (dtype) {
    case DType::kFloat32:
      return write_hidden<float>(call, parts, begin, end);
    case DType::kBFloat16:
      return write_hidden<BFloat16>(call, parts, begin, end);
    case DType::kFloat16:
      return write_hidden<Half>(call, parts, begin, end);
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
  const int64_t blocks = (args.items + kBackwardItems - 1) / kBackwardItems;
  const int64_t count = std::min(threads, blocks);
  const int64_t width = padded_size(args.size);
  const int64_t sums_floats = call.grad_hidden ? args.rows * width : 0;
  const Buffer sums(count * sums_floats);
  std::vector<ItemLossPart> parts;
  for (int64_t n = 0; n < count; ++n) {
    const int64_t first = std::min(args.items, blocks * n / count * kBackwardItems);
    const int64_t last = std::min(args.items, blocks * (n + 1) / count * kBackwardItems);
    float* const part_sums = call.grad_hidden ? sums.get() + n * sums_floats : nullptr;
    parts.push_back({first, last - first, part_sums});
  }
  run_parts(
      count, threads, ItemLossScratch(args.size, true, nullptr).floats, parallel_for,
      [&](int64_t n, float* scratch) { kernel.backward(call, hidden.packed, parts[n], scratch); });
  if (call.grad_hidden == nullptr) return;
  parallel_for(args.rows, 16,
               [&](int64_t begin, int64_t end) { write_hidden(call, dtype, parts, begin, end); });
}

}  // namespace speeder
