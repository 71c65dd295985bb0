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

// The tasks of a backward pass, and what they share. Two things would otherwise take memory for
// each thread: sums of a long sequence's gradient of q, and sums of the tables' gradients.
//
//   alone   all keys of a short sequence and a key head: the task sums the queries' gradient in its
//           thread's scratch memory;
//   shared  a block of keys of a long one: its tasks, by whatever threads, add to one sum in turn.
//
// The sums of shared pairs (a sequence and a key head) lie in a few slots; pairs that are under way
// at once take a slot each, and the next pair waits until its slot is free. A task waits for
// earlier ones alone, and tasks are begun in order, so some task can always go on, on one thread
// too.
struct BackwardPlan {
  // A pair whose keys are shared among tasks.
  struct Pair {
    int64_t sequence, kv_head, blocks;
    int64_t first_done;  // in `done`: of its first task
    int64_t slot;
    int64_t left;      // tasks that are not finished
    int64_t busy = 1;  // 0 once the gradient is written, and the slot free
  };
  struct SharedTask {
    BackwardTask task;
    int64_t pair;
    int64_t block;  // of the pair's keys
  };

  static constexpr int64_t kSlotFloats = int64_t{1} << 24;   // of all slots, or of two
  static constexpr int64_t kTableFloats = int64_t{1} << 23;  // of all sums of one table, or of one

  Plan<BackwardTask> alone;
  std::vector<SharedTask> shared;
  std::vector<Pair> pairs;
  std::vector<int64_t> done;  // BackwardTask's, of every shared task
  int64_t alone_queries = 0;  // of the longest sequence that has a task alone
  int64_t slots = 0, slot_floats = 0;

  BackwardPlan(const AttentionArgs& args, bool need_q, int64_t threads) {
    const int64_t block = key_block(args), group = args.heads / args.kv_heads;
    std::vector<double> costs(args.sequences);
    double total = 0;
    for (int64_t s = 0; s < args.sequences; ++s) {
      const int64_t queries = args.cu_q[s + 1] - args.cu_q[s];
      const int64_t keys = args.cu_k[s + 1] - args.cu_k[s];
      const double pairs_seen = seen_pairs(args, queries, keys, 0, queries, 0, keys);
      costs[s] = cost_of(queries * group, keys, pairs_seen * group);
      total += costs[s] * args.kv_heads;
    }
    for (int64_t s = 0; s < args.sequences; ++s) {
      const int64_t queries = args.cu_q[s + 1] - args.cu_q[s];
      const int64_t keys = args.cu_k[s + 1] - args.cu_k[s];
      const int64_t floats = queries * group * padded(args.size);
      // More than half a thread's share of the work, or more memory than each thread shall have.
      const bool is_long = threads > 1 && costs[s] > total / (2.0 * threads) && keys > block;
      const bool is_large = need_q && floats > kOwnQueryFloats;
      for (int64_t h = 0; h < args.kv_heads; ++h) {
        if (keys > 0 && (is_long || is_large)) {
          const int64_t blocks = (keys + block - 1) / block;
          pairs.push_back({s, h, blocks, 0, 0, blocks});
          if (need_q) slot_floats = std::max(slot_floats, floats);
        } else {
          alone.add({s, h, 0, keys}, costs[s]);
          if (keys > 0) alone_queries = std::max(alone_queries, queries);
        }
      }
    }
    const int64_t most =
        slot_floats == 0 ? threads : std::max<int64_t>(kSlotFloats / slot_floats, 2);
    slots = std::min({most, threads, static_cast<int64_t>(pairs.size())});
    share_out(args, block);
  }

  // How many sums of a table of `floats` floats there may be, of `wanted`.
  static int64_t table_sums(int64_t wanted, int64_t floats) {
    return std::clamp<int64_t>(kTableFloats / std::max<int64_t>(floats, 1), 1, wanted);
  }

 private:
  // As many pairs at a time as there are slots, their blocks of keys in turn: so that a task rarely
  // finds the one before it at work.
  void share_out(const AttentionArgs& args, int64_t block) {
    const int64_t count = pairs.size();
    for (int64_t first = 0; first < count; first += slots) {
      const int64_t last = std::min(count, first + slots);
      int64_t blocks = 0;
      for (int64_t p = first; p < last; ++p) {
        pairs[p].slot = p - first;
        pairs[p].first_done = done.size();
        const int64_t queries = args.cu_q[pairs[p].sequence + 1] - args.cu_q[pairs[p].sequence];
        done.resize(done.size() + pairs[p].blocks, queries);
        blocks = std::max(blocks, pairs[p].blocks);
      }
      for (int64_t b = 0; b < blocks; ++b) {
        for (int64_t p = first; p < last; ++p) {
          if (b >= pairs[p].blocks) continue;
          const int64_t s = pairs[p].sequence, keys = args.cu_k[s + 1] - args.cu_k[s];
          const int64_t from = b * block;
          shared.push_back({{s, pairs[p].kv_head, from, std::min(block, keys - from)}, p, b});
        }
      }
    }
  }
};

}  // namespace
}  // namespace speeder
