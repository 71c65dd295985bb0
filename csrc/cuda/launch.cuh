// Runs kernels (see device.h) on a stream. Only .cu files include this.
#pragma once

#include <cuda_runtime.h>

#include "cuda/device.h"

namespace speeder {
namespace cuda {

template <typename Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kMinBlocks) run(const Kernel kernel) {
  kernel();
}

// Launches one kernel after the other on a stream, and none after one that failed.
class StreamLauncher {
 public:
  explicit StreamLauncher(void* stream) : stream_(static_cast<cudaStream_t>(stream)) {}

  template <typename Kernel>
  void launch(const Grid& grid, const Kernel& kernel) {
    constexpr int64_t kFree = 48 * 1024;  // shared memory that needs no asking for
    if (error_ != nullptr || grid.x * grid.y * grid.z == 0) return;
    if (grid.shared_bytes > kFree &&
        cudaFuncSetAttribute(run<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(grid.shared_bytes)) != cudaSuccess) {
      cudaGetLastError();  // it would be told once more by the next launch
      error_ = "these sizes need more shared memory than a block has on this GPU";
      return;
    }
    const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
                      static_cast<unsigned>(grid.z));
    run<Kernel><<<blocks, grid.threads, grid.shared_bytes, stream_>>>(kernel);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) error_ = cudaGetErrorString(error);
  }

  // Null, or what went wrong.
  const char* error() const { return error_; }

 private:
  cudaStream_t stream_;
  const char* error_ = nullptr;
};

}  // namespace cuda
}  // namespace speeder
