// The launchers on a stream for one element type, without those of the tables' last sums. Each is
// compiled in a file of its own, so that they compile side by side.
#pragma once

#include "cuda/attention/geometry.h"

namespace speeder {
namespace cuda {

template <typename T>
const char* spae_forward_of(const AttentionForward& call, const Extents& extents, float* scratch,
                            void* stream);
template <typename T>
const char* spae_backward_of(const AttentionBackward& call, const Extents& extents,
                             const BackwardPlan& plan, float* scratch, void* stream);

}  // namespace cuda
}  // namespace speeder
