// What a launch may ask for. No CUDA header: the tests' launcher, which runs kernels on the host,
// refuses what a GPU's does.
#pragma once

#include <cstdint>
#include <cstdio>

#include "cuda/common/device.h"

namespace speeder {
namespace cuda {

constexpr int64_t kBlocksMost = 0x7FFFFFFF;   // in x
constexpr int64_t kBlocksMostBeside = 65535;  // in y, and in z

// A text that stays until this thread makes the next one: launchers return no more than a pointer.
template <typename... Numbers>
const char* message(const char* format, Numbers... numbers) {
  thread_local char text[256];
  snprintf(text, sizeof(text), format, static_cast<long long>(numbers)...);
  return text;
}

// Null, or why a launch is refused; `shared_most`: bytes that a block may have on this GPU.
inline const char* refusal(const Grid& grid, int64_t shared_most) {
  if (grid.x > kBlocksMost || grid.y > kBlocksMostBeside || grid.z > kBlocksMostBeside) {
    return message(
        "the sizes need a grid of %lld x %lld x %lld blocks, and a GPU takes %lld x %lld x %lld",
        grid.x, grid.y, grid.z, kBlocksMost, kBlocksMostBeside, kBlocksMostBeside);
  }
  if (grid.shared_bytes > shared_most) {
    return message(
        "the sizes need %lld bytes of shared memory for a block, and this GPU gives it %lld",
        grid.shared_bytes, shared_most);
  }
  return nullptr;
}

}  // namespace cuda
}  // namespace speeder
