// Cuts spae_attention into tasks and deals them to the threads. Included by attention.cpp
// alone.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/attention/tasks.h"

namespace speeder {
namespace {

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

  // How many pieces to deal: some for each thread, so that all end together.
  int64_t parts(int64_t threads, int64_t per_thread) const {
    const int64_t most = tasks.size();
    return std::min(most, threads == 1 ? 1 : threads * per_thread);
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
inline double cost_of(double rows, double keys, double pairs) {
  return pairs + 8 * rows + 16 * keys;
}

// Pairs of `count` queries from `first` on and the keys that they see, of `key_count` keys from
// `first_key` on.
inline double seen_pairs(const AttentionArgs& args, int64_t queries, int64_t keys, int64_t first,
                         int64_t count, int64_t first_key, int64_t key_count) {
  if (!args.causal) return static_cast<double>(count) * key_count;
  double pairs = 0;
  for (int64_t i = first; i < first + count; ++i) {
    pairs += std::clamp<int64_t>(keys - queries + i + 1 - first_key, 0, key_count);
  }
  return pairs;
}

inline Plan<ForwardTask> plan_forward(const AttentionArgs& args) {
  Plan<ForwardTask> plan;
  const double group = args.heads / args.kv_heads;
  for (int64_t s = 0; s < args.sequences; ++s) {
    const int64_t queries = args.cu_q[s + 1] - args.cu_q[s];
    const int64_t keys = args.cu_k[s + 1] - args.cu_k[s];
    if (few_queries(args, queries)) continue;
    const int64_t most = query_block(kForwardRows, args);
    const int64_t blocks = (queries + most - 1) / most;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t first = queries * b / blocks, count = queries * (b + 1) / blocks - first;
      const double pairs = seen_pairs(args, queries, keys, first, count, 0, keys);
      for (int64_t h = 0; h < args.kv_heads; ++h) {
        plan.add({s, h, first, count}, cost_of(count * group, keys, pairs * group));
      }
    }
  }
  return plan;
}

// The tasks of sequences with few queries. A sequence with more than a small part of all keys is
// shared among tasks, so that one user with a long history has all threads.
struct DecodePlan {
  DecodePlan(const AttentionArgs& args, int64_t threads) {
    int64_t total = 0;
    for (int64_t s = 0; s < args.sequences; ++s) {
      if (has_tasks(args, s)) total += args.cu_k[s + 1] - args.cu_k[s];
    }
    const int64_t share = std::max(total / (4 * threads), 4 * kDecodeKeys);
    for (int64_t s = 0; s < args.sequences; ++s) {
      if (!has_tasks(args, s)) continue;
      const int64_t keys = args.cu_k[s + 1] - args.cu_k[s];
      const int64_t parts = std::max<int64_t>(1, (keys + share - 1) / share);
      if (parts > 1) shared.push_back({static_cast<int64_t>(tasks.size()), parts});
      for (int64_t n = 0; n < parts; ++n) {
        const int64_t first = keys * n / parts, count = keys * (n + 1) / parts - first;
        tasks.push_back({s, first, count, nullptr, nullptr, nullptr});
      }
    }
    const int64_t rows = args.kv_heads * kDecodeRows, stride = rows * (args.size + 2);
    int64_t used = 0;
    for (const Shared& range : shared) used += range.count * stride;
    sums.resize(used);
    float* at = sums.data();
    for (const Shared& range : shared) {
      for (int64_t n = range.first; n < range.first + range.count; ++n, at += stride) {
        tasks[n].sums = at;
        tasks[n].top = at + rows * args.size;
        tasks[n].total = tasks[n].top + rows;
      }
    }
  }

  static bool has_tasks(const AttentionArgs& args, int64_t s) {
    const int64_t queries = args.cu_q[s + 1] - args.cu_q[s];
    return queries > 0 && few_queries(args, queries);
  }

  // The tasks that share a sequence.
  struct Shared {
    int64_t first, count;
  };

  std::vector<DecodeTask> tasks;
  std::vector<Shared> shared;
  std::vector<float> sums;
};

// A sequence and key head whose keys are shared among tasks: the tasks' sums of the queries'
// gradient lie one after another from `sums`, `floats` each.
struct SharedGradient {
  int64_t sequence, kv_head, tasks, floats;
  float* sums;
};

struct BackwardPlan : Plan<BackwardTask> {
  std::vector<SharedGradient> shared;
  int64_t shared_floats = 0;

  // Gives every shared sum its place in `memory`, of shared_floats floats.
  void place(float* memory) {
    for (SharedGradient& gradient : shared) {
      gradient.sums = memory;
      memory += gradient.tasks * gradient.floats;
    }
    size_t n = 0;
    for (SharedGradient& gradient : shared) {
      while (tasks[n].sequence != gradient.sequence || tasks[n].kv_head != gradient.kv_head) ++n;
      for (int64_t t = 0; t < gradient.tasks; ++t, ++n) {
        tasks[n].shared_grad_q = gradient.sums + t * gradient.floats;
      }
    }
  }
};

// Keys are shared among tasks where one sequence and key head is more than half a thread's share of
// the work: a few long sequences, or one among short ones.
inline BackwardPlan plan_backward(const AttentionArgs& args, int64_t threads) {
  constexpr double kMostTasks = 16;  // of one sequence and key head: each has its own sums
  BackwardPlan plan;
  const int64_t block = key_block(args), group = args.heads / args.kv_heads;
  std::vector<double> costs(args.sequences);
  double total = 0;
  for (int64_t s = 0; s < args.sequences; ++s) {
    const int64_t queries = args.cu_q[s + 1] - args.cu_q[s];
    const int64_t keys = args.cu_k[s + 1] - args.cu_k[s];
    const double pairs = seen_pairs(args, queries, keys, 0, queries, 0, keys);
    costs[s] = cost_of(queries * group, keys, pairs * group);
    total += costs[s] * args.kv_heads;
  }
  for (int64_t s = 0; s < args.sequences; ++s) {
    const int64_t queries = args.cu_q[s + 1] - args.cu_q[s];
    const int64_t keys = args.cu_k[s + 1] - args.cu_k[s];
    const double wanted = std::min(kMostTasks, std::ceil(costs[s] / (total / (2.0 * threads))));
    const int64_t blocks = (keys + block - 1) / block;
    const int64_t parts = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(blocks, 1));
    for (int64_t h = 0; h < args.kv_heads; ++h) {
      for (int64_t n = 0; n < parts; ++n) {
        const int64_t first = std::min(keys, blocks * n / parts * block);
        const int64_t count = std::min(keys, blocks * (n + 1) / parts * block) - first;
        const double pairs = seen_pairs(args, queries, keys, 0, queries, first, count);
        const double cost = cost_of(queries * group, count, pairs * group);
        plan.add({s, h, first, count, nullptr}, cost);
      }
      if (parts == 1) continue;
      plan.shared.push_back({s, h, parts, queries * group * padded(args.size), nullptr});
      plan.shared_floats += parts * plan.shared.back().floats;
    }
  }
  return plan;
}

}  // namespace
}  // namespace speeder
