// compress_items on a CPU: plain functions over raw pointers, no torch header.
//
//   gates[u]  = softmax of logits[u] over the modalities that are present, 0 for the others
//   mixed[u]  = sum over m of gates[u,m] * experts[u,m]
//   tokens[u] = mixed[u] / sqrt(mean of mixed[u]^2 + eps) * weight
//
// An item's experts are read from memory once, in the forward and in the backward pass. Arithmetic
// is in float32; an absent modality's row is never read.
#pragma once

#include <cstdint>

#include "cpu/common/parallel.h"
#include "dtype.h"

namespace speeder {

struct CompressArgs {
  const void* experts;  // (items, modalities, size), dense
  const float* logits;  // (items, modalities)
  const bool* present;  // (items, modalities)
  const float* weight;  // (size,)
  int64_t items;
  int64_t modalities;
  int64_t size;
  float eps;
};

struct CompressForward {
  CompressArgs args;
  void* tokens;  // (items, size)
  float* gates;  // (items, modalities)
};

// A gradient that is not asked for is null, and costs nothing.
struct CompressBackward {
  CompressArgs args;
  const void* grad_tokens;  // (items, size), dense
  const float* grad_gates;  // (items, modalities)
  void* grad_experts;       // (items, modalities, size)
  float* grad_logits;       // (items, modalities)
  float* grad_weight;       // (size,)
};

void compress_items(const CompressForward& call, DType dtype, int64_t threads,
                    const ParallelFor& parallel_for);
void compress_items_backward(const CompressBackward& call, DType dtype, int64_t threads,
                             const ParallelFor& parallel_for);

}  // namespace speeder
