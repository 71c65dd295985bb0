// The launchers that by_dtype.h declares; a .cu file that includes this says which of them it
// compiles.
#pragma once

#include <type_traits>

#include "cuda/attention/by_dtype.h"
#include "cuda/attention/kernel_launches.cuh"
#include "cuda/common/stream_launcher.cuh"

namespace speeder {
namespace cuda {

// Calls `f` with the head size to compile for, as a type: the smallest of these that holds `size`.
template <typename F>
void with_head_size(int64_t size, F&& f) {
  if (size <= 32) return f(std::integral_constant<int, 32>{});
  if (size <= 64) return f(std::integral_constant<int, 64>{});
  if (size <= 96) return f(std::integral_constant<int, 96>{});
  if (size <= 128) return f(std::integral_constant<int, 128>{});
  f(std::integral_constant<int, kLargestHead>{});
}

template <typename T>
const char* spae_forward_of(const AttentionForward& call, const Extents& extents, float* scratch,
                            void* stream) {
  StreamLauncher launcher(stream);
  with_head_size(call.args.size, [&](auto size) {
    launch_spae_forward<T, decltype(size)::value>(call, extents, scratch, launcher);
  });
  return launcher.error();
}

template <typename T>
const char* spae_backward_of(const AttentionBackward& call, const Extents& extents,
                             const BackwardPlan& plan, float* scratch, void* stream) {
  StreamLauncher launcher(stream);
  with_head_size(call.args.size, [&](auto size) {
    launch_spae_grads<T, decltype(size)::value>(call, extents, plan, scratch, launcher);
  });
  return launcher.error();
}

}  // namespace cuda
}  // namespace speeder
