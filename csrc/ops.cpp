// Registers the CPU kernels with torch, on its stable ABI: one library serves every torch from
// 2.10 on. The schemas are in speeder_kernels/ops.py.
#include "binding.h"
#include "cpu/pack_tokens.h"

namespace speeder {
namespace {

void run_parallel(int64_t count, int64_t grain, const Body& body) {
  torch::stable::parallel_for(0, count, grain, body);
}

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

}  // namespace
}  // namespace speeder

STABLE_TORCH_LIBRARY_IMPL(speeder, CPU, library) {
  library.impl("pack_tokens_kernel", TORCH_BOX(&speeder::pack_tokens_cpu));
  library.impl("sum_rows_kernel", TORCH_BOX(&speeder::sum_rows_cpu));
}
