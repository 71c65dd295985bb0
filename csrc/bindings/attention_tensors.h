// What the CPU and the CUDA binding of spae_attention share: checks of its tensors, and which
// gradients there are.
#pragma once

#include <optional>
#include <tuple>

#include "bindings/tensors.h"
#include "cpu/attention/attention.h"

namespace speeder {

inline TokenView token_view(const Tensor& tensor, int64_t tokens, int64_t heads, int64_t size,
                            DType dtype) {
  STD_TORCH_CHECK(dtype_of(tensor) == dtype && tensor.dim() == 3 && tensor.size(0) == tokens &&
                      tensor.size(1) == heads && tensor.size(2) == size &&
                      (size == 1 || tensor.stride(2) == 1),
                  "expected (tokens, heads, size) tensors of one dtype, the last dimension dense");
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)};
}

// A (heads, n) table; n goes to `columns`.
inline const float* float_table(const Tensor& tensor, int64_t heads, int64_t* columns) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.dim() == 2 &&
                      tensor.size(0) == heads && tensor.size(1) > 0 && tensor.is_contiguous(),
                  "expected a contiguous float32 bias table with a row for each head");
  *columns = tensor.size(1);
  return tensor.const_data_ptr<float>();
}

// What the forward and the backward pass share.
inline AttentionArgs attention_args(const Tensor& q, const Tensor& k, const Tensor& v,
                                    const Tensor& cu_q, const Tensor& cu_k, const Tensor& rank_q,
                                    const Tensor& rank_k, const std::optional<Tensor>& relative,
                                    const std::optional<Tensor>& absolute, double scale,
                                    bool causal) {
  AttentionArgs args{};
  const DType dtype = dtype_of(q);
  args.sequences = cu_q.size(0) - 1;
  args.heads = q.size(1);
  args.kv_heads = k.size(1);
  args.size = q.size(2);
  STD_TORCH_CHECK(args.sequences >= 0 && args.size > 0 && args.heads > 0 && args.kv_heads > 0 &&
                      args.heads % args.kv_heads == 0,
                  "expected heads of at least one element, key heads that divide the query heads, "
                  "and sequences");
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

// The gradients' tensors, whose places go to `call`. `needs` has a bit for each of q, k, v,
// relative and absolute; what is not needed comes back empty.
inline std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> new_gradients(
    const Tensor& q, const Tensor& k, const Tensor& v, int64_t needs, AttentionBackward& call) {
  const AttentionArgs& args = call.args;
  const bool need_q = needs & 1, need_k = needs & 2, need_v = needs & 4;
  const bool need_relative = (needs & 8) && args.relative;
  const bool need_absolute = (needs & 16) && args.absolute;
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
  return {grad_q, grad_k, grad_v, grad_relative, grad_absolute};
}

// What the forward pass gave, and the gradient of its output.
inline void take_saved(const Tensor& grad, const Tensor& out, const Tensor& lse, int64_t tokens,
                       DType dtype, AttentionBackward& call) {
  const AttentionArgs& args = call.args;
  call.grad = token_view(grad, tokens, args.heads, args.size, dtype);
  const TokenView saved = token_view(out, tokens, args.heads, args.size, dtype);
  STD_TORCH_CHECK(saved.head_stride == args.size && saved.token_stride == args.heads * args.size &&
                      lse.is_contiguous() && lse.numel() == tokens * args.heads,
                  "expected out and lse as the forward pass gave them");
  call.out = saved.data;
  call.lse = lse.const_data_ptr<float>();
}

}  // namespace speeder
