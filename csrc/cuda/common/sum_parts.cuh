// The last step of sums without atomics: blocks have left sums of their own, which are added up in
// a fixed order.
#pragma once

#include "cuda/common/device.h"
#include "cuda/common/dispatch.h"

namespace speeder {
namespace cuda {

// out[n] = the sum over `parts` rows of `size` values. A block has 32 columns: every warp adds some
// of the rows, the first one what the warps have.
struct SumParts {
  static constexpr int kThreads = 1024, kMinBlocks = 1;
  static constexpr int kWarps = kThreads / kWarp;

  const float* rows;  // (parts, size)
  float* out;         // (size,)
  int64_t parts;
  int64_t size;

  SPEEDER_DEVICE void operator()() const {
    SharedLayout layout;
    const Shared<float> sums = layout.take<float>(kThreads);
    const int64_t n = int64_t{block_index_x()} * kWarp + lane();
    float total = 0.0f;
    if (n < size) {
      for (int64_t part = warp(); part < parts; part += kWarps) total += rows[part * size + n];
    }
    sums.set(thread_index(), total);
    sync_block();
    if (warp() > 0 || n >= size) return;
    float whole = 0.0f;
    for (int w = 0; w < kWarps; ++w) whole += sums.get(w * kWarp + lane());
    out[n] = whole;
  }
};

template <typename Launcher>
void launch_sum_parts(const float* rows, float* out, int64_t parts, int64_t size,
                      Launcher& launcher) {
  launcher.launch(Grid{divide_up(size, kWarp), 1, 1, SumParts::kThreads, SumParts::kThreads * 4},
                  SumParts{rows, out, parts, size});
}

}  // namespace cuda
}  // namespace speeder
