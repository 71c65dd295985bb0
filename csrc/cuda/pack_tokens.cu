// pack_tokens on a GPU: the kernels' entry points and their launchers.
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/pack_tokens.cuh"
#include "cuda/pack_tokens.h"

namespace speeder {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 16;  // the loops in the kernels take what is left
constexpr int kVectorBytes = 16;

__device__ Place here() {
  return {static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x,
          static_cast<int64_t>(gridDim.x) * blockDim.x};
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    pack_tokens_kernel(PackTables<T> tables, PackIndices indices, T* out, int64_t tokens,
                       int64_t hidden) {
  pack_tokens<T, N>(here(), tables, indices, out, tokens, hidden);
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    sum_rows_kernel(const T* grad, const int64_t* order, const int64_t* starts, T* out,
                    int64_t rows, int64_t hidden) {
  sum_rows<T, N>(here(), grad, order, starts, out, rows, hidden);
}

int blocks_for(int64_t threads) {
  return static_cast<int>(std::min((threads + kThreads - 1) / kThreads, kMaxBlocks));
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename T, int N>
void launch_pack(const PackArgs& args, cudaStream_t stream) {
  const PackTables<T> tables{static_cast<const T*>(args.text_embedding),
                             static_cast<const T*>(args.item_tokens),
                             static_cast<const T*>(args.position_prompts)};
  const PackIndices indices{args.input_ids, args.item_rows, args.ranks};
  const int blocks = blocks_for(args.tokens * (args.hidden / N));
  pack_tokens_kernel<T, N><<<blocks, kThreads, 0, stream>>>(
      tables, indices, static_cast<T*>(args.out), args.tokens, args.hidden);
}

template <typename T>
void launch_pack(const PackArgs& args, cudaStream_t stream) {
  constexpr int N = kVectorBytes / sizeof(T);
  const bool wide = args.hidden % N == 0 && aligned(args.text_embedding) &&
                    aligned(args.item_tokens) && aligned(args.position_prompts) &&
                    aligned(args.out);
  wide ? launch_pack<T, N>(args, stream) : launch_pack<T, 1>(args, stream);
}

template <typename T, int N>
void launch_sum(const SumArgs& args, cudaStream_t stream) {
  const int blocks = blocks_for(args.rows * (args.hidden / N));
  sum_rows_kernel<T, N>
      <<<blocks, kThreads, 0, stream>>>(static_cast<const T*>(args.grad), args.order, args.starts,
                                        static_cast<T*>(args.out), args.rows, args.hidden);
}

template <typename T>
void launch_sum(const SumArgs& args, cudaStream_t stream) {
  constexpr int N = kVectorBytes / sizeof(T);
  const bool wide = args.hidden % N == 0 && aligned(args.grad) && aligned(args.out);
  wide ? launch_sum<T, N>(args, stream) : launch_sum<T, 1>(args, stream);
}

}  // namespace

const char* pack_tokens(const PackArgs& args, DType dtype, void* stream) {
  const cudaStream_t cuda_stream = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case DType::kFloat32:
      launch_pack<float>(args, cuda_stream);
      break;
    case DType::kBFloat16:
      launch_pack<BFloat16>(args, cuda_stream);
      break;
    case DType::kFloat16:
      launch_pack<Half>(args, cuda_stream);
      break;
  }
  return launch_error();
}

const char* sum_rows(const SumArgs& args, DType dtype, void* stream) {
  if (args.rows == 0) return nullptr;  // a grid of no blocks is an error to CUDA
  const cudaStream_t cuda_stream = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case DType::kFloat32:
      launch_sum<float>(args, cuda_stream);
      break;
    case DType::kBFloat16:
      launch_sum<BFloat16>(args, cuda_stream);
      break;
    case DType::kFloat16:
      launch_sum<Half>(args, cuda_stream);
      break;
  }
  return launch_error();
}

}  // namespace cuda
}  // namespace speeder
