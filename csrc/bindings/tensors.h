// What the CPU and the CUDA binding share: checks of the tensors that reach a kernel. The Python
// layer has already checked the caller's arguments; these guard the raw pointers.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "dtype.h"

namespace speeder {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, "expected float32, bfloat16 or float16");
  }
}

template <typename T = int64_t>
const T* indices(const Tensor& tensor, int64_t count) {
  constexpr ScalarType type = sizeof(T) == 4 ? ScalarType::Int : ScalarType::Long;
  STD_TORCH_CHECK(tensor.scalar_type() == type && tensor.dim() == 1 && tensor.size(0) == count &&
                      tensor.is_contiguous(),
                  "expected contiguous indices of the right length and integer type");
  return tensor.const_data_ptr<T>();
}

inline const float* floats(const Tensor& tensor, int64_t count) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.dim() == 1 &&
                      tensor.size(0) == count && tensor.is_contiguous(),
                  "expected a contiguous float32 vector of the right length");
  return tensor.const_data_ptr<float>();
}

inline const float* floats(const Tensor& tensor, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.dim() == 2 &&
                      tensor.size(0) == rows && tensor.size(1) == columns && tensor.is_contiguous(),
                  "expected a contiguous float32 matrix of the right shape");
  return tensor.const_data_ptr<float>();
}

inline const void* table(const Tensor& tensor, int64_t hidden, DType dtype) {
  STD_TORCH_CHECK(dtype_of(tensor) == dtype && tensor.dim() == 2 && tensor.size(1) == hidden &&
                      hidden > 0 && tensor.is_contiguous(),
                  "expected a contiguous table with the same dtype and hidden size as the others");
  return tensor.const_data_ptr();
}

inline Tensor new_matrix(const Tensor& like, int64_t rows, int64_t columns) {
  return torch::stable::new_empty(like, std::vector<int64_t>{rows, columns});
}

}  // namespace speeder
