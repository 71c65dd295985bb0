// topk_items on a CPU: shares the work out, keeps each row's candidates and picks the best of them.
// The loops over scores are in tiles.cpp.
#include "cpu/topk_items/topk_items.h"

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "cpu/common/isa.h"
#include "cpu/common/run_parts.h"
#include "cpu/topk_items/tiles.h"

namespace speeder {
namespace {

const TopkKernels& kernels(DType dtype) {
  const int type = static_cast<int>(dtype);
#if defined(__x86_64__)
  switch (instruction_set()) {
    case Isa::kAvx512Amx:
      if (dtype == DType::kBFloat16) return avx512_amx::kTopk[type];
      [[fallthrough]];
    case Isa::kAvx512Bf16:
      if (dtype == DType::kBFloat16) return avx512_bf16::kTopk[type];
      [[fallthrough]];
    case Isa::kAvx512:
      return avx512::kTopk[type];
    case Isa::kAvx2:
      return avx2::kTopk[type];
    case Isa::kPortable:
      break;
  }
#endif
  return portable::kTopk[type];
}

// A score and its item as one integer that sorts by falling score, then by rising item: the score's
// bits above, made monotonic, and the negated item below. NaN sorts first, to be found and refused.
constexpr int64_t kLow32 = 0xFFFFFFFF;

int64_t encode(float score, int64_t item) {
  score = std::isnan(score) ? std::numeric_limits<float>::quiet_NaN() : score + 0.0f;  // no -0
  int32_t bits;
  std::memcpy(&bits, &score, sizeof(bits));
  const int64_t ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF);
  return ordered * (kLow32 + 1) + (kLow32 - item);
}

float score_of(int64_t key) {
  const int32_t ordered = static_cast<int32_t>(key >> 32);
  const int32_t bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF);
  float score;
  std::memcpy(&score, &bits, sizeof(score));
  return score;
}

int64_t item_of(int64_t key) { return kLow32 - (key & kLow32); }

// The rows' excluded items, sorted for look-ups.
struct Excluded {
  Excluded(const TopkArgs& args, const ParallelFor& parallel_for) : starts(args.exclude_indptr) {
    if (starts == nullptr) return;
    items.assign(args.exclude_items, args.exclude_items + starts[args.rows]);
    parallel_for(args.rows, 64, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        std::sort(items.begin() + starts[n], items.begin() + starts[n + 1]);
      }
    });
  }
  bool has(int64_t row, int64_t item) const {
    return starts != nullptr &&
           std::binary_search(items.begin() + starts[row], items.begin() + starts[row + 1], item);
  }
  const int64_t* starts;
  std::vector<int64_t> items;
};

// The candidates of one task: a group of rows and a chunk of items. A row's list may grow to twice
// k and some, and is then cut back to its best k.
class Candidates {
 public:
  Candidates(const TopkArgs& args, const Excluded& excluded, int64_t group)
      : k_(args.k),
        most_(2 * args.k + 64),
        first_row_(group * kGroupRows),
        excluded_(excluded),
        keys_(kGroupRows),
        thresholds_(kGroupRows, std::numeric_limits<float>::quiet_NaN()) {}

  CandidateSink sink() {
    const auto push = [](void* state, int64_t row, int64_t item, float score) {
      static_cast<Candidates*>(state)->push(row, item, score);
    };
    return {push, this, thresholds_.data()};
  }

  // Up to k keys of one row, in any order.
  std::vector<int64_t>& best(int64_t row) {
    cut(keys_[row]);
    return keys_[row];
  }

 private:
  void push(int64_t row, int64_t item, float score) {
    if (excluded_.has(first_row_ + row, item)) return;
    std::vector<int64_t>& keys = keys_[row];
    if (keys.capacity() == 0) keys.reserve(most_);
    keys.push_back(encode(score, item));
    if (static_cast<int64_t>(keys.size()) < most_) return;
    cut(keys);
    thresholds_[row] = score_of(keys[k_ - 1]);
  }

  // Cuts to the best k, the k-th last.
  void cut(std::vector<int64_t>& keys) const {
    if (static_cast<int64_t>(keys.size()) < k_) return;
    std::nth_element(keys.begin(), keys.begin() + (k_ - 1), keys.end(), std::greater<int64_t>());
    keys.resize(k_);
  }

  const int64_t k_, most_, first_row_;
  const Excluded& excluded_;
  std::vector<std::vector<int64_t>> keys_;
  std::vector<float> thresholds_;
};

}  // namespace

void topk_items(const TopkArgs& args, DType dtype, int64_t threads,
                const ParallelFor& parallel_for) {
  // Where the rows are few, their items are shared among the threads: twice as many chunks, so that
  // a thread that is held up holds up nobody.
  constexpr int64_t kLeastItems = 1024;
  const TopkKernels& kernel = kernels(dtype);
  const Excluded excluded(args, parallel_for);
  const int64_t groups = groups_of(args.rows);
  const int64_t wanted = threads == 1 ? 1 : (2 * threads + groups - 1) / groups;
  const int64_t chunks =
      std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, args.items / kLeastItems));
  const Buffer columns(groups * group_floats(args.size));
  parallel_for(groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      kernel.pack(args, group, columns.get() + group * group_floats(args.size));
    }
  });

  // The chunks' best k of each row, one chunk after another.
  std::vector<std::vector<int64_t>> best(args.rows * chunks);
  run_parts(groups * chunks, threads, topk_scratch_floats(args.size), parallel_for,
            [&](int64_t task, float* scratch) {
              const int64_t group = task / chunks, chunk = task % chunks;
              const int64_t first = args.items * chunk / chunks;
              const int64_t count = args.items * (chunk + 1) / chunks - first;
              Candidates candidates(args, excluded, group);
              kernel.score(args, group, columns.get() + group * group_floats(args.size), first,
                           count, candidates.sink(), scratch);
              const int64_t rows = std::min(kGroupRows, args.rows - group * kGroupRows);
              for (int64_t n = 0; n < rows; ++n) {
                best[(group * kGroupRows + n) * chunks + chunk] = std::move(candidates.best(n));
              }
            });
  parallel_for(args.rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      std::vector<int64_t>& keys = best[n * chunks];
      for (int64_t c = 1; c < chunks; ++c) {
        const std::vector<int64_t>& more = best[n * chunks + c];
        keys.insert(keys.end(), more.begin(), more.end());
      }
      const int64_t found = std::min<int64_t>(args.k, keys.size());
      std::partial_sort(keys.begin(), keys.begin() + found, keys.end(), std::greater<int64_t>());
      for (int64_t i = 0; i < args.k; ++i) {
        args.scores[n * args.k + i] = i < found ? score_of(keys[i]) : -HUGE_VALF;
        args.best[n * args.k + i] = i < found ? item_of(keys[i]) : -1;
      }
    }
  });
}

}  // namespace speeder
