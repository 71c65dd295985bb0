// What the CPU and the CUDA binding of compress_items share: its arguments out of tensors, and the
// tensors of its results.
#pragma once

#include <tuple>

#include "bindings/tensors.h"
#include "cpu/compress_items/compress_items.h"

namespace speeder {

inline CompressArgs compress_args(const Tensor& experts, const Tensor& logits,
                                  const Tensor& present, const Tensor& weight, double eps) {
  CompressArgs args{};
  STD_TORCH_CHECK(experts.dim() == 3 && experts.is_contiguous(),
                  "expected contiguous expert outputs (items, modalities, size)");
  args.items = experts.size(0);
  args.modalities = experts.size(1);
  args.size = experts.size(2);
  STD_TORCH_CHECK(args.modalities > 0 && args.size > 0,
                  "expected at least one modality of at least one element");
  STD_TORCH_CHECK(present.scalar_type() == ScalarType::Bool && present.is_contiguous() &&
                      present.numel() == args.items * args.modalities,
                  "expected a contiguous bool mask (items, modalities)");
  args.experts = experts.const_data_ptr();
  args.logits = floats(logits, args.items, args.modalities);
  args.present = present.const_data_ptr<bool>();
  args.weight = floats(weight, args.size);
  args.eps = static_cast<float>(eps);
  return args;
}

// Tokens and gates, whose places go to `call`.
inline std::tuple<Tensor, Tensor> new_tokens(const Tensor& experts, CompressForward& call) {
  const CompressArgs& args = call.args;
  Tensor tokens = new_matrix(experts, args.items, args.size);
  Tensor gates =
      torch::stable::new_empty(experts, {args.items, args.modalities}, ScalarType::Float);
  call.tokens = tokens.mutable_data_ptr();
  call.gates = gates.mutable_data_ptr<float>();
  return {tokens, gates};
}

// The gradients' tensors, whose places go to `call`, and those of the results' gradients. `needs`
// has a bit for each of expert_outputs, gate_logits and norm_weight; what is not needed comes back
// empty.
inline std::tuple<Tensor, Tensor, Tensor> new_gradients(const Tensor& grad_tokens,
                                                        const Tensor& grad_gates,
                                                        const Tensor& experts, int64_t needs,
                                                        CompressBackward& call) {
  const CompressArgs& args = call.args;
  STD_TORCH_CHECK(grad_tokens.size(0) == args.items, "expected a gradient for each item");
  call.grad_tokens = table(grad_tokens, args.size, dtype_of(experts));
  call.grad_gates = floats(grad_gates, args.items, args.modalities);
  using torch::stable::new_empty;
  Tensor grad_experts =
      new_empty(experts, {needs & 1 ? args.items : 0, args.modalities, args.size});
  Tensor grad_logits =
      new_empty(experts, {needs & 2 ? args.items : 0, args.modalities}, ScalarType::Float);
  Tensor grad_weight = new_empty(experts, {needs & 4 ? args.size : 0}, ScalarType::Float);
  if (needs & 1) call.grad_experts = grad_experts.mutable_data_ptr();
  if (needs & 2) call.grad_logits = grad_logits.mutable_data_ptr<float>();
  if (needs & 4) call.grad_weight = grad_weight.mutable_data_ptr<float>();
  return {grad_experts, grad_logits, grad_weight};
}

}  // namespace speeder
