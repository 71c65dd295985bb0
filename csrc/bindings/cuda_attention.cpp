// Registers the CUDA kernels of spae_attention with torch, on its stable ABI.
#include <cmath>

#include "bindings/attention_tensors.h"
#include "bindings/torch_stream.h"
#include "cuda/attention/attention.h"

namespace speeder {
namespace {

Tensor new_scratch(const Tensor& like, int64_t floats) {
  return torch::stable::new_empty(like, {floats}, ScalarType::Float);
}

// Rows of a sequence that is longer than was told belong to no block: they become NaN. All others
// are written afterwards. Where all tokens were told, there are none.
void fill_untold(const Tensor& rows, int64_t longest) {
  if (longest < rows.size(0)) torch::stable::fill_(rows, std::nan(""));
}

std::tuple<Tensor, Tensor> spae_attention_cuda(const Tensor& q, const Tensor& k, const Tensor& v,
                                               const Tensor& cu_q, const Tensor& cu_k,
                                               const Tensor& rank_q, const Tensor& rank_k,
                                               const std::optional<Tensor>& relative,
                                               const std::optional<Tensor>& absolute,
                                               int64_t longest_q, int64_t longest_k, double scale,
                                               bool causal) {
  const DeviceGuard guard(q.get_device_index());
  AttentionForward call{};
  call.args =
      attention_args(q, k, v, cu_q, cu_k, rank_q, rank_k, relative, absolute, scale, causal);
  const cuda::Extents extents{q.size(0), k.size(0), longest_q, longest_k};
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1)}, ScalarType::Float);
  fill_untold(out, longest_q);
  call.out = out.mutable_data_ptr();
  call.lse = lse.mutable_data_ptr<float>();
  Tensor scratch = new_scratch(q, cuda::spae_attention_scratch(call.args, extents));
  void* stream = current_stream(q.get_device_index());
  check_launch(
      cuda::spae_attention(call, extents, dtype_of(q), scratch.mutable_data_ptr<float>(), stream));
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> spae_attention_backward_cuda(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& lse, const Tensor& cu_q, const Tensor& cu_k, const Tensor& rank_q,
    const Tensor& rank_k, const std::optional<Tensor>& relative,
    const std::optional<Tensor>& absolute, int64_t longest_q, int64_t longest_k, double scale,
    bool causal, int64_t needs) {
  const DeviceGuard guard(q.get_device_index());
  AttentionBackward call{};
  call.args =
      attention_args(q, k, v, cu_q, cu_k, rank_q, rank_k, relative, absolute, scale, causal);
  const cuda::Extents extents{q.size(0), k.size(0), longest_q, longest_k};
  const DType dtype = dtype_of(q);
  take_saved(grad, out, lse, q.size(0), dtype, call);
  auto gradients = new_gradients(q, k, v, needs, call);
  fill_untold(std::get<0>(gradients), longest_q);
  fill_untold(std::get<1>(gradients), longest_k);
  fill_untold(std::get<2>(gradients), longest_k);
  Tensor scratch = new_scratch(q, cuda::spae_attention_backward_scratch(call, extents));
  void* stream = current_stream(q.get_device_index());
  check_launch(cuda::spae_attention_backward(call, extents, dtype,
                                             scratch.mutable_data_ptr<float>(), stream));
  return gradients;
}

}  // namespace
}  // namespace speeder

STABLE_TORCH_LIBRARY_IMPL(speeder, CUDA, library) {
  library.impl("spae_attention_kernel", TORCH_BOX(&speeder::spae_attention_cuda));
  library.impl("spae_attention_backward_kernel", TORCH_BOX(&speeder::spae_attention_backward_cuda));
}
