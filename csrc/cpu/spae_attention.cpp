// spae_attention on a CPU: cuts the work into tasks, deals them to the threads, prepares the bias
// tables and adds up their gradients. The loops over tokens are in spae_forward.cpp and
// spae_backward.cpp.
#include "cpu/spae_attention.h"

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "cpu/isa.h"
#include "cpu/spae_tasks.h"

namespace speeder {
namespace {

constexpr float kLog2E = 1.44269504088896341f;

struct Kernels {
  const ForwardKernel* forward;
  const BackwardKernel* backward;
};

Kernels kernels() {
#if defined(__x86_64__)
  switch (instruction_set()) {
    case Isa::kAvx512Bf16:
    case Isa::kAvx512:
      return {avx512::kForward, avx512::kBackward};
    case Isa::kAvx2:
      return {avx2::kForward, avx2::kBackward};
    case Isa::kPortable:
      break;
  }
#endif
  return {portable::kForward, portable::kBackward};
}

// Floats at an address that suits every vector.
class Buffer {
 public:
  explicit Buffer(int64_t floats)
      : data_(static_cast<float*>(::operator new(floats * sizeof(float), kAlignment))) {}
  float* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Delete {
    void operator()(float* p) const { ::operator delete(p, kAlignment); }
  };
  std::unique_ptr<float, Delete> data_;
};

// The prepared tables and the memory they are in.
struct PreparedTables {
  explicit PreparedTables(const AttentionArgs& args)
      : relative(args.relative ? args.heads * relative_stride(args) : 0),
        absolute(args.absolute ? args.heads * args.positions : 0),
        tables{args.relative ? relative.get() : nullptr, args.absolute ? absolute.get() : nullptr} {
    const int64_t stride = relative_stride(args), last = args.buckets - 1;
    for (int64_t h = 0; args.relative && h < args.heads; ++h) {
      for (int64_t c = 0; c < stride; ++c) {
        const int64_t distance = std::clamp<int64_t>(kMaxWidth + last - c, 0, last);
        relative.get()[h * stride + c] = args.relative[h * args.buckets + distance] * kLog2E;
      }
    }
    for (int64_t n = 0; args.absolute && n < args.heads * args.positions; ++n) {
      absolute.get()[n] = args.absolute[n] * kLog2E;
    }
  }
  const Buffer relative, absolute;
  const BiasTables tables;
};

// Tasks in order and what each costs, dealt in pieces of nearly equal cost: a fixed dealing, so
// that sums are the same from run to run.
template <typename Task>
struct Plan {
  std::vector<Task> tasks;
  std::vector<double> costs;

  void add(const Task& task, double cost) {
    tasks.push_back(task);
    costs.push_back(cost);
  }

  // Where each of `parts` pieces begins, and the end.
  std::vector<size_t> deal(int64_t parts) const {
    double total = 0, so_far = 0;
    for (double cost : costs) total += cost;
    std::vector<size_t> starts = {0};
    for (size_t n = 0; n < tasks.size(); ++n) {
      while (static_cast<int64_t>(starts.size()) < parts &&
             so_far + costs[n] / 2 > total * static_cast<double>(starts.size()) / parts) {
        starts.push_back(n);
      }
      so_far += costs[n];
    }
    starts.resize(parts + 1, tasks.size());
    return starts;
  }
};

// What `rows` query rows and `keys` keys cost, of which `pairs` pairs are computed: packing a row
// is worth some pairs.
double cost_of(double rows, double keys, double pairs) { return pairs + 8 * rows + 16 * keys; }

// Pairs of queries first .. first + count - 1 of a sequence and the keys they see.
double seen_pairs(const AttentionArgs& args, int64_t queries, int64_t keys, int64_t first,
                  int64_t count) {
  if (!args.causal) return static_cast<double>(count) * keys;
  double pairs = 0;
  for (int64_t i = first; i < first + count; ++i) {
    pairs += std::clamp<int64_t>(keys - queries + i + 1, 0, keys);
  }
  return pairs;
}

Plan<ForwardTask> plan_forward(const AttentionArgs& args) {
  Plan<ForwardTask> plan;
  const double group = args.heads / args.kv_heads;
  for (int64_t s = 0; s < args.sequences; ++s) {
    const int64_t queries = args.cu_q[s + 1] - args.cu_q[s];
    const int64_t keys = args.cu_k[s + 1] - args.cu_k[s];
    const int64_t most = query_block(kForwardRows, args);
    const int64_t blocks = (queries + most - 1) / most;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t first = queries * b / blocks, count = queries * (b + 1) / blocks - first;
      const double pairs = seen_pairs(args, queries, keys, first, count);
      for (int64_t h = 0; h < args.kv_heads; ++h) {
        plan.add({s, h, first, count}, cost_of(count * group, keys, pairs * group));
      }
    }
  }
  return plan;
}

Plan<BackwardTask> plan_backward(const AttentionArgs& args) {
  Plan<BackwardTask> plan;
  const double group = args.heads / args.kv_heads;
  for (int64_t s = 0; s < args.sequences; ++s) {
    const int64_t queries = args.cu_q[s + 1] - args.cu_q[s];
    const int64_t keys = args.cu_k[s + 1] - args.cu_k[s];
    const double pairs = seen_pairs(args, queries, keys, 0, queries);
    for (int64_t h = 0; h < args.kv_heads; ++h) {
      plan.add({s, h}, cost_of(queries * group, keys, pairs * group));
    }
  }
  return plan;
}

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

}  // namespace

void spae_attention(const AttentionForward& call, DType dtype, int64_t threads,
                    const ParallelFor& parallel_for) {
  const auto kernel = kernels().forward[static_cast<int>(dtype)];
  const PreparedTables prepared(call.args);
  const auto plan = plan_forward(call.args);
  const int64_t parts = std::min<int64_t>(threads, plan.tasks.size());
  const auto starts = plan.deal(parts);
  parallel_for(parts, 1, [&](int64_t begin, int64_t end) {
    const Buffer scratch(ForwardScratch(call.args, nullptr).floats);
    for (size_t n = starts[begin]; n < starts[end]; ++n) {
      const ForwardTask* next = n + 1 < starts[end] ? &plan.tasks[n + 1] : nullptr;
      kernel(call, prepared.tables, plan.tasks[n], next, scratch.get());
    }
  });
}

void spae_attention_backward(const AttentionBackward& call, DType dtype, int64_t threads,
                             const ParallelFor& parallel_for) {
  const AttentionArgs& args = call.args;
  const auto kernel = kernels().backward[static_cast<int>(dtype)];
  const PreparedTables prepared(args);
  const auto plan = plan_backward(args);
  const int64_t parts = std::min<int64_t>(threads, plan.tasks.size());
  const auto starts = plan.deal(parts);
  int64_t longest = 0;
  for (int64_t s = 0; s < args.sequences; ++s) {
    longest = std::max<int64_t>(longest, args.cu_q[s + 1] - args.cu_q[s]);
  }
  const TableSums relative(call.grad_relative, parts, args.heads * relative_stride(args));
  const TableSums absolute(call.grad_absolute, parts, args.heads * args.positions);
  parallel_for(parts, 1, [&](int64_t begin, int64_t end) {
    const Buffer scratch(BackwardScratch(args, longest, nullptr).floats);
    for (int64_t part = begin; part < end; ++part) {
      const BiasSums sums{relative.part(part), absolute.part(part)};
      for (size_t n = starts[part]; n < starts[part + 1]; ++n) {
        const BackwardTask* next = n + 1 < starts[part + 1] ? &plan.tasks[n + 1] : nullptr;
        kernel(call, prepared.tables, plan.tasks[n], next, sums, scratch.get());
      }
    }
  });
  if (call.grad_relative) write_relative(args, relative.total(), call.grad_relative);
  if (call.grad_absolute) {
    std::copy_n(absolute.total(), args.heads * args.positions, call.grad_absolute);
  }
}

}  // namespace speeder
