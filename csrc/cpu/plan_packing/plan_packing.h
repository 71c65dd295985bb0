// The sequence-packing planner: first-fit decreasing in O(n log n).
#pragma once

#include <cstdint>
#include <vector>

namespace speeder {

// Bins of indices into `lengths`, each at most `max_tokens` in sum. The longest goes first, each
// into the first bin with room; among equals the lower index goes first. Lengths must lie in
// 1 .. max_tokens.
std::vector<std::vector<int64_t>> plan_packing(const int64_t* lengths, int64_t count,
                                               int64_t max_tokens);

}  // namespace speeder
