// Registers the CPU kernels of spae_attention with torch, on its stable ABI. The schemas are in
// speeder_kernels/ops.py.
#include "bindings/attention_tensors.h"
#include "bindings/torch_threads.h"
#include "cpu/attention/attention.h"

namespace speeder {
namespace {

// The longest lengths, which a GPU asks for, are not used: here cu_q and cu_k are read.
std::tuple<Tensor, Tensor> spae_attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                              const Tensor& cu_q, const Tensor& cu_k,
                                              const Tensor& rank_q, const Tensor& rank_k,
                                              const std::optional<Tensor>& relative,
                                              const std::optional<Tensor>& absolute, int64_t,
                                              int64_t, double scale, bool causal) {
  AttentionForward call{};
  call.args =
      attention_args(q, k, v, cu_q, cu_k, rank_q, rank_k, relative, absolute, scale, causal);
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1)}, ScalarType::Float);
  call.out = out.mutable_data_ptr();
  call.lse = lse.mutable_data_ptr<float>();
  spae_attention(call, dtype_of(q), torch::stable::get_num_threads(), run_parallel);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> spae_attention_backward_cpu(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& lse, const Tensor& cu_q, const Tensor& cu_k, const Tensor& rank_q,
    const Tensor& rank_k, const std::optional<Tensor>& relative,
    const std::optional<Tensor>& absolute, int64_t, int64_t, double scale, bool causal,
    int64_t needs) {
  AttentionBackward call{};
  call.args =
      attention_args(q, k, v, cu_q, cu_k, rank_q, rank_k, relative, absolute, scale, causal);
  const DType dtype = dtype_of(q);
  take_saved(grad, out, lse, q.size(0), dtype, call);
  auto gradients = new_gradients(q, k, v, needs, call);
  spae_attention_backward(call, dtype, torch::stable::get_num_threads(), run_parallel);
  return gradients;
}

}  // namespace
}  // namespace speeder

STABLE_TORCH_LIBRARY_IMPL(speeder, CPU, library) {
  library.impl("spae_attention_kernel", TORCH_BOX(&speeder::spae_attention_cpu));
  library.impl("spae_attention_backward_kernel", TORCH_BOX(&speeder::spae_attention_backward_cpu));
}
