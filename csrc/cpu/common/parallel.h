// How a CPU kernel shares its work out: a function that the binding passes in, so that kernels run
// on torch's own threads without knowing torch.
#pragma once

#include <cstdint>
#include <functional>

namespace speeder {

// Runs body(begin, end) over pieces of [0, count), `grain` or more at a time, on the caller's
// threads.
using Body = std::function<void(int64_t begin, int64_t end)>;
using ParallelFor = std::function<void(int64_t count, int64_t grain, const Body& body)>;

}  // namespace speeder
