// What launch functions share: the element type by its number, and whether accesses of 16
// bytes will do.
#pragma once

#include <cstdint>

#include "cuda/common/device.h"

namespace speeder {
namespace cuda {

// Calls `f` with a value of the type that `dtype` stands for.
template <typename F>
void with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Half{});
  }
}

inline bool aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0;
}

inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

}  // namespace cuda
}  // namespace speeder
