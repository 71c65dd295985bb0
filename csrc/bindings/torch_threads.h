// What the CPU bindings share: torch's own threads, as the kernels ask for them.
#pragma once

#include "bindings/tensors.h"
#include "cpu/common/parallel.h"

namespace speeder {

inline void run_parallel(int64_t count, int64_t grain, const Body& body) {
  torch::stable::parallel_for(0, count, grain, body);
}

}  // namespace speeder
