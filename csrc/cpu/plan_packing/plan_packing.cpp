// The sequence-packing planner. A segment tree over the bins holds the most room in each range, so
// that the first bin with enough is found in one walk from the root.
#include "cpu/plan_packing/plan_packing.h"

#include <algorithm>
#include <numeric>

namespace speeder {

std::vector<std::vector<int64_t>> plan_packing(const int64_t* lengths, int64_t count,
                                               int64_t max_tokens) {
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
  int64_t leaves = 1;  // at most one bin a sequence
  while (leaves < count) leaves *= 2;
  std::vector<int64_t> room(2 * leaves, max_tokens);
  std::vector<std::vector<int64_t>> bins;
  for (const int64_t index : order) {
    int64_t node = 1;
    while (node < leaves) node = 2 * node + (room[2 * node] >= lengths[index] ? 0 : 1);
    const int64_t bin = node - leaves;
    if (bin == static_cast<int64_t>(bins.size())) bins.emplace_back();
    bins[bin].push_back(index);
    room[node] -= lengths[index];
    while (node > 1) {
      node /= 2;
      room[node] = std::max(room[2 * node], room[2 * node + 1]);
    }
  }
  return bins;
}

}  // namespace speeder
