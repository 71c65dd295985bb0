// Registers the CPU kernels with torch, on its stable ABI: one library serves every torch from
// 2.10 on. The schemas are in speeder_kernels/ops.py.
#include "binding_attention.h"
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
  library.impl("pack_values_fit_kernel", TORCH_BOX(&speeder::pack_values_fit_cpu));
  library.impl("pack_tokens_kernel", TORCH_BOX(&speeder::pack_tokens_cpu));
  library.impl("sum_rows_kernel", TORCH_BOX(&speeder::sum_rows_cpu));
  library.impl("spae_attention_kernel", TORCH_BOX(&speeder::spae_attention_cpu));
  library.impl("spae_attention_backward_kernel", TORCH_BOX(&speeder::spae_attention_backward_cpu));
}
