// Registers the CUDA kernels of all ops but attention with torch, on its stable ABI. Loaded only
// where torch has CUDA.
#include "bindings/compress_tensors.h"
#include "bindings/torch_stream.h"
#include "cuda/compress_items/compress_items.h"
#include "cuda/pack_tokens/pack_tokens.h"

namespace speeder {
namespace {

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
  const cuda::PackTables tables{text_embedding.size(0), item_tokens.size(0),
                                position_prompts.size(0)};
  void* stream = current_stream(text_embedding.get_device_index());
  check_launch(cuda::pack_tokens(args, tables, dtype, stream));
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

std::tuple<Tensor, Tensor> compress_items_cuda(const Tensor& experts, const Tensor& logits,
                                               const Tensor& present, const Tensor& weight,
                                               double eps) {
  const DeviceGuard guard(experts.get_device_index());
  CompressForward call{};
  call.args = compress_args(experts, logits, present, weight, eps);
  const auto results = new_tokens(experts, call);
  void* stream = current_stream(experts.get_device_index());
  check_launch(cuda::compress_items(call, dtype_of(experts), stream));
  return results;
}

std::tuple<Tensor, Tensor, Tensor> compress_items_backward_cuda(
    const Tensor& grad_tokens, const Tensor& grad_gates, const Tensor& experts,
    const Tensor& logits, const Tensor& present, const Tensor& weight, double eps, int64_t needs) {
  const DeviceGuard guard(experts.get_device_index());
  CompressBackward call{};
  call.args = compress_args(experts, logits, present, weight, eps);
  const auto grads = new_gradients(grad_tokens, grad_gates, experts, needs, call);
  const int64_t floats = needs & 4 ? cuda::compress_scratch_floats(call.args) : 0;
  Tensor scratch = torch::stable::new_empty(experts, {floats}, ScalarType::Float);
  float* parts = needs & 4 ? scratch.mutable_data_ptr<float>() : nullptr;
  void* stream = current_stream(experts.get_device_index());
  check_launch(cuda::compress_items_backward(call, parts, dtype_of(experts), stream));
  return grads;
}

}  // namespace
}  // namespace speeder

STABLE_TORCH_LIBRARY_IMPL(speeder, CUDA, library) {
  library.impl("pack_tokens_kernel", TORCH_BOX(&speeder::pack_tokens_cuda));
  library.impl("sum_rows_kernel", TORCH_BOX(&speeder::sum_rows_cuda));
  library.impl("compress_items_kernel", TORCH_BOX(&speeder::compress_items_cuda));
  library.impl("compress_items_backward_kernel", TORCH_BOX(&speeder::compress_items_backward_cuda));
}
