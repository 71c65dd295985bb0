// Registers the CPU kernels with torch, on its stable ABI: one library serves every torch from
// 2.10 on. The schemas are in speeder_kernels/ops.py.
#include "binding_cpu.h"
#include "cpu/pack_tokens.h"
#include "cpu/spae_attention.h"

namespace speeder {
namespace {

Tensor pack_tokens_cpu(const Tensor& input_ids, const Tensor& text_embedding,
                       const Tensor& item_tokens, const Tensor& item_rows, const Tensor& ranks,
                       const Tensor& position_prompts) {
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
  pack_tokens(args, dtype, run_parallel);
  return out;
}

bool pack_values_fit_cpu(const Tensor& input_ids, const Tensor& item_rows, const Tensor& ranks,
                         int64_t vocabulary, int64_t items, int64_t prompts) {
  const int64_t tokens = input_ids.size(0);
  PackArgs args{};
  args.input_ids = indices(input_ids, tokens);
  args.item_rows = indices(item_rows, tokens);
  args.ranks = indices(ranks, tokens);
  args.tokens = tokens;
  return pack_values_fit(args, vocabulary, items, prompts);
}

Tensor sum_rows_cpu(const Tensor& grad, const Tensor& order, const Tensor& starts) {
  const int64_t hidden = grad.size(1), rows = starts.size(0) - 1;
  const DType dtype = dtype_of(grad);
  Tensor out = new_matrix(grad, rows, hidden);
  const SumArgs args{table(grad, hidden, dtype),
                     indices(order, grad.size(0)),
                     indices(starts, rows + 1),
                     out.mutable_data_ptr(),
                     rows,
                     hidden};
  sum_rows(args, dtype, run_parallel);
  return out;
}

TokenView token_view(const Tensor& tensor, int64_t tokens, int64_t heads, int64_t size,
                     DType dtype) {
  STD_TORCH_CHECK(dtype_of(tensor) == dtype && tensor.dim() == 3 && tensor.size(0) == tokens &&
                      tensor.size(1) == heads && tensor.size(2) == size &&
                      (size == 1 || tensor.stride(2) == 1),
                  "expected (tokens, heads, size) tensors of one dtype, the last dimension dense");
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)};
}

// A (heads, n) table; n goes to `columns`.
const float* float_table(const Tensor& tensor, int64_t heads, int64_t* columns) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.dim() == 2 &&
                      tensor.size(0) == heads && tensor.size(1) > 0 && tensor.is_contiguous(),
                  "expected a contiguous float32 bias table with a row for each head");
  *columns = tensor.size(1);
  return tensor.const_data_ptr<float>();
}

// What the forward and the backward pass share.
AttentionArgs attention_args(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_q,
                             const Tensor& cu_k, const Tensor& rank_q, const Tensor& rank_k,
                             const std::optional<Tensor>& relative,
                             const std::optional<Tensor>& absolute, double scale, bool causal) {
  AttentionArgs args{};
  const DType dtype = dtype_of(q);
  args.sequences = cu_q.size(0) - 1;
  args.heads = q.size(1);
  args.kv_heads = k.size(1);
  args.size = q.size(2);
  args.q = token_view(q, q.size(0), args.heads, args.size, dtype);
  args.k = token_view(k, k.size(0), args.kv_heads, args.size, dtype);
  args.v = token_view(v, k.size(0), args.kv_heads, args.size, dtype);
  args.cu_q = indices<int32_t>(cu_q, args.sequences + 1);
  args.cu_k = indices<int32_t>(cu_k, args.sequences + 1);
  args.rank_q = indices<int32_t>(rank_q, q.size(0));
  args.rank_k = indices<int32_t>(rank_k, k.size(0));
  if (relative) args.relative = float_table(*relative, args.heads, &args.buckets);
  if (absolute) args.absolute = float_table(*absolute, args.heads, &args.positions);
  args.scale = static_cast<float>(scale);
  args.causal = causal;
  return args;
}

std::tuple<Tensor, Tensor> spae_attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                              const Tensor& cu_q, const Tensor& cu_k,
                                              const Tensor& rank_q, const Tensor& rank_k,
                                              const std::optional<Tensor>& relative,
                                              const std::optional<Tensor>& absolute, double scale,
                                              bool causal) {
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

// `needs` has a bit for each of q, k, v, relative and absolute; what is not needed comes back
// empty.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> spae_attention_backward_cpu(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& lse, const Tensor& cu_q, const Tensor& cu_k, const Tensor& rank_q,
    const Tensor& rank_k, const std::optional<Tensor>& relative,
    const std::optional<Tensor>& absolute, double scale, bool causal, int64_t needs) {
  AttentionBackward call{};
  call.args =
      attention_args(q, k, v, cu_q, cu_k, rank_q, rank_k, relative, absolute, scale, causal);
  const AttentionArgs& args = call.args;
  const DType dtype = dtype_of(q);
  call.grad = token_view(grad, q.size(0), args.heads, args.size, dtype);
  const TokenView saved = token_view(out, q.size(0), args.heads, args.size, dtype);
  STD_TORCH_CHECK(saved.head_stride == args.size && saved.token_stride == args.heads * args.size &&
                      lse.is_contiguous() && lse.numel() == q.size(0) * args.heads,
                  "expected out and lse as the forward pass gave them");
  call.out = saved.data;
  call.lse = lse.const_data_ptr<float>();
  const bool need_q = needs & 1, need_k = needs & 2, need_v = needs & 4;
  const bool need_relative = (needs & 8) && relative, need_absolute = (needs & 16) && absolute;
  using torch::stable::new_empty;
  Tensor grad_q = new_empty(q, {need_q ? q.size(0) : 0, q.size(1), q.size(2)});
  Tensor grad_k = new_empty(k, {need_k ? k.size(0) : 0, k.size(1), k.size(2)});
  Tensor grad_v = new_empty(v, {need_v ? v.size(0) : 0, v.size(1), v.size(2)});
  Tensor grad_relative =
      new_empty(q, {need_relative ? args.heads : 0, args.buckets}, ScalarType::Float);
  Tensor grad_absolute =
      new_empty(q, {need_absolute ? args.heads : 0, args.positions}, ScalarType::Float);
  if (need_q) call.grad_q = grad_q.mutable_data_ptr();
  if (need_k) call.grad_k = grad_k.mutable_data_ptr();
  if (need_v) call.grad_v = grad_v.mutable_data_ptr();
  if (need_relative) call.grad_relative = grad_relative.mutable_data_ptr<float>();
  if (need_absolute) call.grad_absolute = grad_absolute.mutable_data_ptr<float>();
  spae_attention_backward(call, dtype, torch::stable::get_num_threads(), run_parallel);
  return {grad_q, grad_k, grad_v, grad_relative, grad_absolute};
}

}  // namespace
}  // namespace speeder

STABLE_TORCH_LIBRARY_IMPL(speeder, CPU, library) {
  library.impl("pack_values_fit_kernel", TORCH_BOX(&speeder::pack_values_fit_cpu));
  library.impl("pack_tokens_kernel", TORCH_BOX(&speeder::pack_tokens_cpu));
  library.impl("sum_rows_kernel", TORCH_BOX(&speeder::sum_rows_cpu));
  library.impl("spae_attention_kernel", TORCH_BOX(&speeder::spae_attention_cpu));
  library.impl("spae_attention_backward_kernel", TORCH_BOX(&speeder::spae_attention_backward_cpu));
}
