// Runs kernels (see device.h) on a stream. Only .cu files include this.
#pragma once

#include <cuda_runtime.h>

#include "cuda/common/launch_limits.h"

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
    if (error_ != nullptr || grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    const int64_t shared_most = grid.shared_bytes > kSharedFree ? this->shared_most() : kSharedFree;
    if (error_ == nullptr) error_ = refusal(grid, shared_most);
    if (error_ != nullptr) return;
    if (grid.shared_bytes > kSharedFree) {
      note(cudaFuncSetAttribute(run<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(grid.shared_bytes)));
      if (error_ != nullptr) return;
    }
    const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
                      static_cast<unsigned>(grid.z));
    void* arguments[] = {const_cast<Kernel*>(&kernel)};
    note(cudaLaunchKernel(reinterpret_cast<const void*>(run<Kernel>), blocks, dim3(grid.threads),
                          arguments, grid.shared_bytes, stream_));
  }

  // Bytes of shared memory that a block may have on the current device.
  int64_t shared_most() {
    int device = 0, bytes = 0;
    note(cudaGetDevice(&device));
    note(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    return bytes;
  }

  // Null, or what went wrong.
  const char* error() const { return error_; }

 private:
  static constexpr int64_t kSharedFree = 48 * 1024;  // that needs no asking for

  void note(cudaError_t status) {
    if (status == cudaSuccess || error_ != nullptr) return;
    cudaGetLastError();  // it would be told once more by the next call
    error_ = cudaGetErrorString(status);
  }

  cudaStream_t stream_;
  const char* error_ = nullptr;
};

}  // namespace cuda
}  // namespace speeder
