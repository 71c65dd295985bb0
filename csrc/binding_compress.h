// What the CPU and the CUDA binding of compress_items share: its arguments out of tensors.
#pragma once

#include "binding.h"
#include "cpu/compress_items.h"

namespace speeder {

inline CompressArgs compress_args(const Tensor& experts, const Tensor& logits,
                                  const Tensor& present, const Tensor& weight, double eps) {
  CompressArgs args{};
  STD_TORCH_CHECK(experts.dim() == 3 && experts.is_contiguous(),
                  "expected contiguous expert outputs (items, modalities, size)");
  args.items = experts.size(0);
  args.modalities = experts.size(1);
  args.size = experts.size(2);
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

}  // namespace speeder
