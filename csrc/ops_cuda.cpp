// Registers the CUDA kernels with torch, on its stable ABI. Loaded only where torch has CUDA.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "binding.h"
#include "cuda/pack_tokens.h"

namespace speeder {
namespace {

using torch::stable::accelerator::DeviceGuard;

// torch's current stream. The function lives in libtorch_cuda.so, which a CPU-only torch, with
// which this file can be built too, does not have: so it is looked up when first called.
void* current_stream(int32_t device) {
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

void check_launch(const char* error) {
  STD_TORCH_CHECK(error == nullptr, "CUDA: ", error == nullptr ? "" : error);
}

Tensor pack_tokens_cuda(const Tensor& input_ids, const Tensor& text_embedding,
                        const Tensor& item_tokens, const Tensor& item_rows, const Tensor& ranks,
                        const Tensor& position_prompts) {
  const DeviceGuard guard(text_embedding.get_device_index());
  const int64_t tokens = input_ids.size(0), hidden = text_embedding.size(1);
  const DType dtype = dtype_of(text_embedding);
  Tensor out = new_matrix(text_embedding, tokens, hidden);
  const PackArgs args{indices(input_ids, tokens),
                      indices(item_rows, tokens),
                      indices(ranks, tokens),
                      table(text_embedding, hidden, dtype),
                      table(item_tokens, hidden, dtype),
                      table(position_prompts, hidden, dtype),
                      out.mutable_data_ptr(),
                      tokens,
                      hidden};
  check_launch(cuda::pack_tokens(args, dtype, current_stream(text_embedding.get_device_index())));
  return out;
}

Tensor sum_rows_cuda(const Tensor& grad, const Tensor& order, const Tensor& starts) {
  const DeviceGuard guard(grad.get_device_index());
  const int64_t hidden = grad.size(1), rows = starts.size(0) - 1;
  const DType dtype = dtype_of(grad);
  Tensor out = new_matrix(grad, rows, hidden);
  const SumArgs args{table(grad, hidden, dtype),
                     indices(order, grad.size(0)),
                     indices(starts, rows + 1),
                     out.mutable_data_ptr(),
                     rows,
                     hidden};
  check_launch(cuda::sum_rows(args, dtype, current_stream(grad.get_device_index())));
  return out;
}

}  // namespace
}  // namespace speeder

STABLE_TORCH_LIBRARY_IMPL(speeder, CUDA, library) {
  library.impl("pack_tokens_kernel", TORCH_BOX(&speeder::pack_tokens_cuda));
  library.impl("sum_rows_kernel", TORCH_BOX(&speeder::sum_rows_cuda));
}
