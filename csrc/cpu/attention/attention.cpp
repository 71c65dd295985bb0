// spae_attention on a CPU: cuts the work into tasks, deals them to the threads, prepares the bias
// tables and adds up their gradients. The loops over tokens are in forward.cpp, decode.cpp and
// backward.cpp.
#include "cpu/attention/attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/attention/plan.h"
#include "cpu/common/isa.h"
#include "cpu/common/run_parts.h"

namespace speeder {
namespace {

constexpr float kLog2E = 1.44269504088896341f;

// Pieces of work for each thread. More wait less for the last one; in the backward pass each has
// its own sums of the tables' gradients, if they do not become too many.
constexpr int64_t kForwardParts = 16;
constexpr int64_t kBackwardParts = 4;

struct Kernels {
  const ForwardKernel* forward;
  const DecodeKernel* decode;
  const BackwardKernel* backward;
};

Kernels kernels(DType dtype) {
#if defined(__x86_64__)
  switch (instruction_set()) {
    case Isa::kAvx512Amx:
      if (dtype == DType::kBFloat16)
        return {avx512_amx::kForward, avx512::kDecode, avx512_amx::kBackward};
      [[fallthrough]];
    case Isa::kAvx512Bf16:
      if (dtype == DType::kBFloat16)
        return {avx512_bf16::kForward, avx512::kDecode, avx512_bf16::kBackward};
      [[fallthrough]];
    case Isa::kAvx512:
      return {avx512::kForward, avx512::kDecode, avx512::kBackward};
    case Isa::kAvx2:
      return {avx2::kForward, avx2::kDecode, avx2::kBackward};
    case Isa::kPortable:
      break;
  }
#endif
  return {portable::kForward, portable::kDecode, portable::kBackward};
}

// The prepared tables and the memory they are in.
struct PreparedTables {
  explicit PreparedTables(const AttentionArgs& args)
      : relative(args.heads * relative_stride(args)),
        absolute(args.heads * absolute_stride(args)),
        tables{relative.get(), absolute.get()} {
    if (args.relative == nullptr && args.absolute == nullptr) return;
    const int64_t last = buckets_of(args) - 1;
    fill(args.relative, args.heads, buckets_of(args), relative_stride(args), relative.get(),
         [&](int64_t c) { return std::clamp<int64_t>(kMaxWidth + last - c, 0, last); });
    fill(args.absolute, args.heads, positions_of(args), absolute_stride(args), absolute.get(),
         [&](int64_t c) { return std::clamp<int64_t>(c - kMaxWidth, 0, positions_of(args) - 1); });
  }

  template <typename Entry>
  static void fill(const float* table, int64_t heads, int64_t entries, int64_t stride, float* out,
                   const Entry& entry) {
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t c = 0; c < stride; ++c) {
        out[h * stride + c] = table ? table[h * entries + entry(c)] * kLog2E : 0.0f;
      }
    }
  }

  const Buffer relative, absolute;
  const BiasTables tables;
};

// Every part's sums of one table, and their total in the order of the parts.
class TableSums {
 public:
  TableSums(bool wanted, int64_t parts, int64_t floats)
      : parts_(parts), floats_(wanted ? floats : 0), sums_(parts * floats_) {
    std::fill_n(sums_.get(), parts_ * floats_, 0.0f);
  }
  float* part(int64_t n) const { return floats_ ? sums_.get() + n * floats_ : nullptr; }
  const float* total() const {
    for (int64_t n = 1; n < parts_; ++n) {
      for (int64_t c = 0; c < floats_; ++c) sums_.get()[c] += sums_.get()[n * floats_ + c];
    }
    return sums_.get();
  }

 private:
  const int64_t parts_, floats_;
  const Buffer sums_;
};

// The turned table's sums back into (heads, buckets).
void write_relative(const AttentionArgs& args, const float* sums, float* out) {
  const int64_t stride = relative_stride(args), last = args.buckets - 1;
  std::fill_n(out, args.heads * args.buckets, 0.0f);
  for (int64_t h = 0; h < args.heads; ++h) {
    for (int64_t c = 0; c < stride; ++c) {
      const int64_t distance = std::clamp<int64_t>(kMaxWidth + last - c, 0, last);
      out[h * args.buckets + distance] += sums[h * stride + c];
    }
  }
}

// One row of a sequence that several decode tasks share, from what each has summed over its keys.
template <typename T>
void write_decoded(const AttentionForward& call, const DecodeTask* tasks, int64_t count,
                   int64_t from, int64_t row) {
  const int64_t size = call.args.size;
  float top = -HUGE_VALF, total = 0.0f;
  for (int64_t n = 0; n < count; ++n) top = std::max(top, tasks[n].top[from]);
  std::vector<float> sums(size), scales(count);
  for (int64_t n = 0; n < count; ++n) {
    // Where no task has seen a key, the tops are -inf; NaN scores leave a NaN total.
    scales[n] = tasks[n].top[from] == top ? 1.0f : std::exp2(tasks[n].top[from] - top);
    total += scales[n] * tasks[n].total[from];
    for (int64_t d = 0; d < size; ++d) sums[d] += scales[n] * tasks[n].sums[from * size + d];
  }
  T* out = static_cast<T*>(call.out) + row * size;
  for (int64_t d = 0; d < size; ++d) out[d] = from_float<T>(total == 0.0f ? 0.0f : sums[d] / total);
  call.lse[row] = total == 0.0f ? HUGE_VALF : (top + std::log2(total)) / kLog2E;
}

template <typename T>
void write_decoded(const AttentionForward& call, const DecodeTask* tasks, int64_t count) {
  const AttentionArgs& args = call.args;
  const int64_t group = args.heads / args.kv_heads, first = args.cu_q[tasks->sequence];
  const int64_t queries = args.cu_q[tasks->sequence + 1] - first;
  for (int64_t h = 0; h < args.kv_heads; ++h) {
    for (int64_t r = 0; r < queries * group; ++r) {
      const int64_t row = (first + r / group) * args.heads + h * group + r % group;
      write_decoded<T>(call, tasks, count, h * queries * group + r, row);
    }
  }
}

void write_decoded(const AttentionForward& call, DType dtype, const DecodeTask* tasks,
                   int64_t count) {
  switch (dtype) {
    case DType::kFloat32:
      return write_decoded<float>(call, tasks, count);
    case DType::kBFloat16:
      return write_decoded<BFloat16>(call, tasks, count);
    case DType::kFloat16:
      return write_decoded<Half>(call, tasks, count);
  }
}

// The gradient of q of a sequence and key head, from where its tasks have summed it.
template <typename T>
void write_shared(const AttentionBackward& call, const BackwardPlan::Pair& pair,
                  const float* sums) {
  const AttentionArgs& args = call.args;
  const int64_t group = args.heads / args.kv_heads, width = padded(args.size);
  const int64_t end = args.cu_q[pair.sequence + 1];
  for (int64_t token = args.cu_q[pair.sequence]; token < end; ++token) {
    for (int64_t g = 0; g < group; ++g, sums += width) {
      const int64_t head = pair.kv_head * group + g;
      T* out = static_cast<T*>(call.grad_q) + (token * args.heads + head) * args.size;
      for (int64_t d = 0; d < args.size; ++d) out[d] = from_float<T>(sums[d] * args.scale);
    }
  }
}

void write_shared(const AttentionBackward& call, DType dtype, const BackwardPlan::Pair& pair,
                  const float* sums) {
  switch (dtype) {
    case DType::kFloat32:
      return write_shared<float>(call, pair, sums);
    case DType::kBFloat16:
      return write_shared<BFloat16>(call, pair, sums);
    case DType::kFloat16:
      return write_shared<Half>(call, pair, sums);
  }
}

// The tasks that have all keys of a sequence and a key head, in pieces that are dealt beforehand.
void run_alone(const AttentionBackward& call, const BackwardPlan& plan, BackwardKernel kernel,
               const BiasTables& tables, int64_t parts, const TableSums& relative,
               const TableSums& absolute, int64_t threads, const ParallelFor& parallel_for) {
  const auto starts = plan.alone.deal(parts);
  const auto& tasks = plan.alone.tasks;
  const int64_t floats = BackwardScratch(call.args, plan.alone_queries, nullptr).floats;
  run_parts(parts, threads, floats, parallel_for, [&](int64_t part, float* scratch) {
    const BiasSums sums{relative.part(part), absolute.part(part)};
    for (size_t n = starts[part]; n < starts[part + 1]; ++n) {
      const BackwardTask* next = n + 1 < starts[part + 1] ? &tasks[n + 1] : nullptr;
      kernel(call, tables, tasks[n], next, sums, scratch);
    }
  });
}

// The tasks that share a sequence's keys. Threads begin them in order. Task n adds to sums n modulo
// `parts` of the tables, after the task that did so before.
void run_shared(const AttentionBackward& call, DType dtype, BackwardPlan& plan,
                BackwardKernel kernel, const BiasTables& tables, int64_t parts,
                const TableSums& relative, const TableSums& absolute, int64_t threads,
                const ParallelFor& parallel_for) {
  const bool need_q = call.grad_q != nullptr;
  const bool need_tables = call.grad_relative != nullptr || call.grad_absolute != nullptr;
  const int64_t tasks = plan.shared.size();
  const Buffer sums(plan.slots * plan.slot_floats);
  std::vector<int64_t> unfinished(tasks, 1);
  const int64_t floats = BackwardScratch(call.args, 0, nullptr).floats;
  run_parts(tasks, threads, floats, parallel_for, [&](int64_t n, float* scratch) {
    const auto& [given, at, block] = plan.shared[n];
    BackwardPlan::Pair& pair = plan.pairs[at];
    float* const slot = sums.get() + pair.slot * plan.slot_floats;
    BackwardTask task = given;
    if (need_q) {
      task.shared_grad_q = slot;
      task.done = &plan.done[pair.first_done + block];
      task.before = block > 0 ? task.done - 1 : nullptr;
      if (at >= plan.slots) wait_for(&plan.pairs[at - plan.slots].busy, 0);
    }
    if (need_tables && n >= parts) wait_for(&unfinished[n - parts], 0);
    kernel(call, tables, task, nullptr, {relative.part(n % parts), absolute.part(n % parts)},
           scratch);
    lower(&unfinished[n], 0);
    if (!need_q || __atomic_sub_fetch(&pair.left, 1, __ATOMIC_ACQ_REL) > 0) return;
    write_shared(call, dtype, pair, slot);  // who finishes the last task does
    lower(&pair.busy, 0);
  });
}

}  // namespace

void spae_attention(const AttentionForward& call, DType dtype, int64_t threads,
                    const ParallelFor& parallel_for) {
  const Kernels kernel = kernels(dtype);
  const PreparedTables prepared(call.args);
  const auto plan = plan_forward(call.args);
  const int64_t parts = plan.parts(threads, kForwardParts);
  const auto starts = plan.deal(parts);
  const int64_t scratch_floats = ForwardScratch(call.args, nullptr).floats;
  const auto forward = kernel.forward[static_cast<int>(dtype)];
  run_parts(parts, threads, scratch_floats, parallel_for, [&](int64_t part, float* scratch) {
    for (size_t n = starts[part]; n < starts[part + 1]; ++n) {
      const ForwardTask* next = n + 1 < starts[part + 1] ? &plan.tasks[n + 1] : nullptr;
      forward(call, prepared.tables, plan.tasks[n], next, scratch);
    }
  });

  const DecodePlan few(call.args, threads);
  const auto decode = kernel.decode[static_cast<int>(dtype)];
  const int64_t tasks = few.tasks.size(), few_parts = std::min(tasks, threads * kForwardParts);
  const int64_t few_floats = DecodeScratch(call.args, nullptr).floats;
  run_parts(few_parts, threads, few_floats, parallel_for, [&](int64_t part, float* scratch) {
    const int64_t last = tasks * (part + 1) / few_parts - 1;
    for (int64_t n = tasks * part / few_parts; n <= last; ++n) {
      const DecodeTask* next = n < last ? &few.tasks[n + 1] : nullptr;
      decode(call, prepared.tables, few.tasks[n], next, scratch);
    }
  });
  for (const DecodePlan::Shared& range : few.shared) {
    write_decoded(call, dtype, &few.tasks[range.first], range.count);
  }
}

void spae_attention_backward(const AttentionBackward& call, DType dtype, int64_t threads,
                             const ParallelFor& parallel_for) {
  const AttentionArgs& args = call.args;
  const auto kernel = kernels(dtype).backward[static_cast<int>(dtype)];
  const PreparedTables prepared(args);
  BackwardPlan plan(args, call.grad_q != nullptr, threads);
  const int64_t relative_floats = call.grad_relative ? args.heads * relative_stride(args) : 0;
  const int64_t absolute_floats = call.grad_absolute ? args.heads * args.positions : 0;
  const auto parts_of = [&](int64_t tasks) {
    const int64_t wanted = std::min(tasks, threads == 1 ? 1 : threads * kBackwardParts);
    return BackwardPlan::table_sums(std::max<int64_t>(wanted, 1),
                                    std::max(relative_floats, absolute_floats));
  };
  const int64_t alone = parts_of(plan.alone.tasks.size()), shared = parts_of(plan.shared.size());
  const TableSums relative(call.grad_relative, std::max(alone, shared), relative_floats);
  const TableSums absolute(call.grad_absolute, std::max(alone, shared), absolute_floats);
  run_shared(call, dtype, plan, kernel, prepared.tables, shared, relative, absolute, threads,
             parallel_for);
  run_alone(call, plan, kernel, prepared.tables, alone, relative, absolute, threads, parallel_for);
  if (call.grad_relative) write_relative(args, relative.total(), call.grad_relative);
  if (call.grad_absolute) {
    std::copy_n(absolute.total(), args.heads * args.positions, call.grad_absolute);
  }
}

}  // namespace speeder
