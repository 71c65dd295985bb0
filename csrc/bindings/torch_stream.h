// What the CUDA bindings share: torch's current stream, and how a launch that failed is told.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "bindings/tensors.h"

namespace speeder {

using torch::stable::accelerator::DeviceGuard;

// torch's current stream. The function lives in libtorch_cuda.so, which a CPU-only torch, with
// which this file can be built too, does not have: so it is looked up when first called.
inline void* current_stream(int32_t device) {
  using GetStream = AOTITorchError (*)(int32_t, void**);
  static const GetStream get_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    STD_TORCH_CHECK(library != nullptr, "libtorch_cuda.so is not loaded: this torch has no CUDA");
    return reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(get_stream != nullptr, "libtorch_cuda.so cannot tell its current stream");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get_stream(device, &stream));
  return stream;
}

inline void check_launch(const char* error) {
  STD_TORCH_CHECK(error == nullptr, "CUDA: ", error == nullptr ? "" : error);
}

}  // namespace speeder
