// Registers the CPU kernels of all ops but attention with torch, on its stable ABI: one library
// serves every torch from 2.10 on. The schemas are in speeder_kernels/ops.py.
#include "bindings/compress_tensors.h"
#include "bindings/torch_threads.h"
#include "cpu/item_cross_entropy/item_cross_entropy.h"
#include "cpu/pack_tokens/pack_tokens.h"
#include "cpu/topk_items/topk_items.h"

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

std::tuple<Tensor, Tensor> compress_items_cpu(const Tensor& experts, const Tensor& logits,
                                              const Tensor& present, const Tensor& weight,
                                              double eps) {
  CompressForward call{};
  call.args = compress_args(experts, logits, present, weight, eps);
  const auto results = new_tokens(experts, call);
  compress_items(call, dtype_of(experts), torch::stable::get_num_threads(), run_parallel);
  return results;
}

std::tuple<Tensor, Tensor, Tensor> compress_items_backward_cpu(
    const Tensor& grad_tokens, const Tensor& grad_gates, const Tensor& experts,
    const Tensor& logits, const Tensor& present, const Tensor& weight, double eps, int64_t needs) {
  CompressBackward call{};
  call.args = compress_args(experts, logits, present, weight, eps);
  const auto grads = new_gradients(grad_tokens, grad_gates, experts, needs, call);
  const int64_t threads = torch::stable::get_num_threads();
  compress_items_backward(call, dtype_of(experts), threads, run_parallel);
  return grads;
}

// What the forward and the backward pass of item_cross_entropy share.
ItemLossArgs loss_args(const Tensor& hidden, const Tensor& table_, const Tensor& targets,
                       double scale, const std::optional<Tensor>& log_q) {
  ItemLossArgs args{};
  const DType dtype = dtype_of(hidden);
  args.rows = hidden.size(0);
  args.items = table_.size(0);
  args.size = hidden.size(1);
  STD_TORCH_CHECK(args.items > 0, "expected at least one item");
  args.hidden = table(hidden, args.size, dtype);
  args.table = table(table_, args.size, dtype);
  args.targets = indices(targets, args.rows);
  if (log_q) args.log_q = floats(*log_q, args.items);
  args.scale = static_cast<float>(scale);
  return args;
}

std::tuple<Tensor, Tensor> item_cross_entropy_cpu(const Tensor& hidden, const Tensor& table,
                                                  const Tensor& targets, double scale,
                                                  const std::optional<Tensor>& log_q) {
  ItemLossForward call{};
  call.args = loss_args(hidden, table, targets, scale, log_q);
  Tensor loss = torch::stable::new_empty(hidden, {call.args.rows}, ScalarType::Float);
  Tensor lse = torch::stable::new_empty(hidden, {call.args.rows}, ScalarType::Float);
  call.loss = loss.mutable_data_ptr<float>();
  call.lse = lse.mutable_data_ptr<float>();
  item_cross_entropy(call, dtype_of(hidden), torch::stable::get_num_threads(), run_parallel);
  return {loss, lse};
}

// `needs` has a bit for each of hidden and the table; what is not needed comes back empty.
std::tuple<Tensor, Tensor> item_cross_entropy_backward_cpu(
    const Tensor& grad, const Tensor& hidden, const Tensor& table, const Tensor& targets,
    const Tensor& lse, double scale, const std::optional<Tensor>& log_q, int64_t needs) {
  ItemLossBackward call{};
  call.args = loss_args(hidden, table, targets, scale, log_q);
  const ItemLossArgs& args = call.args;
  call.grad = floats(grad, args.rows);
  call.lse = floats(lse, args.rows);
  Tensor grad_hidden = new_matrix(hidden, needs & 1 ? args.rows : 0, args.size);
  Tensor grad_table = new_matrix(table, needs & 2 ? args.items : 0, args.size);
  if (needs & 1) call.grad_hidden = grad_hidden.mutable_data_ptr();
  if (needs & 2) call.grad_table = grad_table.mutable_data_ptr();
  if (needs & 3) {
    item_cross_entropy_backward(call, dtype_of(hidden), torch::stable::get_num_threads(),
                                run_parallel);
  }
  return {grad_hidden, grad_table};
}

std::tuple<Tensor, Tensor> topk_items_cpu(const Tensor& hidden, const Tensor& item_table, int64_t k,
                                          const std::optional<Tensor>& exclude_indptr,
                                          const std::optional<Tensor>& exclude_items) {
  TopkArgs args{};
  const DType dtype = dtype_of(hidden);
  args.rows = hidden.size(0);
  args.items = item_table.size(0);
  args.size = hidden.size(1);
  args.k = k;
  args.hidden = table(hidden, args.size, dtype);
  args.table = table(item_table, args.size, dtype);
  if (exclude_indptr && exclude_items) {
    args.exclude_indptr = indices(*exclude_indptr, args.rows + 1);
    args.exclude_items = indices(*exclude_items, exclude_items->size(0));
  }
  Tensor scores = torch::stable::new_empty(hidden, {args.rows, k}, ScalarType::Float);
  Tensor best = torch::stable::new_empty(hidden, {args.rows, k}, ScalarType::Long);
  args.scores = scores.mutable_data_ptr<float>();
  args.best = best.mutable_data_ptr<int64_t>();
  topk_items(args, dtype, torch::stable::get_num_threads(), run_parallel);
  return {scores, best};
}

}  // namespace
}  // namespace speeder

STABLE_TORCH_LIBRARY_IMPL(speeder, CPU, library) {
  library.impl("pack_values_fit_kernel", TORCH_BOX(&speeder::pack_values_fit_cpu));
  library.impl("pack_tokens_kernel", TORCH_BOX(&speeder::pack_tokens_cpu));
  library.impl("sum_rows_kernel", TORCH_BOX(&speeder::sum_rows_cpu));
  library.impl("compress_items_kernel", TORCH_BOX(&speeder::compress_items_cpu));
  library.impl("compress_items_backward_kernel", TORCH_BOX(&speeder::compress_items_backward_cpu));
  library.impl("item_cross_entropy_kernel", TORCH_BOX(&speeder::item_cross_entropy_cpu));
  library.impl("item_cross_entropy_backward_kernel",
               TORCH_BOX(&speeder::item_cross_entropy_backward_cpu));
  library.impl("topk_items_kernel", TORCH_BOX(&speeder::topk_items_cpu));
}
