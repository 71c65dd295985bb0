// spae_attention on a GPU: what the launchers check, how much working memory they ask for, and the
// kernels that all element types share. The others are compiled in forward_*.cu and
// backward_*.cu, for one element type each.
#include "cuda/attention/by_dtype.h"
#include "cuda/attention/kernel_launches.cuh"
#include "cuda/common/stream_launcher.cuh"

namespace speeder {
namespace cuda {
namespace {

// Calls `f` with a value of the type that `dtype` stands for; float32 has been refused.
template <typename F>
void with_half_dtype(DType dtype, F&& f) {
  dtype == DType::kBFloat16 ? f(BFloat16{}) : f(Half{});
}

// The finest grid of all passes has a block for 16 tokens and a head.
const char* refusal(const AttentionArgs& args, const Extents& extents, DType dtype) {
  if (dtype == DType::kFloat32) {
    return "spae_attention: expected bfloat16 or float16 on this backend, got float32";
  }
  if (args.size > kLargestHead) {
    return message("spae_attention: a head has at most %lld elements on a GPU, got %lld",
                   kLargestHead, args.size);
  }
  const int64_t tiles = divide_up(std::max(extents.longest_q, extents.longest_k), 16);
  if (tiles * args.sequences > kBlocksMost / args.heads) {
    return message(
        "spae_attention: %lld sequences of up to %lld tokens and %lld heads are more than a "
        "grid has blocks for",
        args.sequences, std::max(extents.longest_q, extents.longest_k), args.heads);
  }
  return nullptr;
}

}  // namespace

int64_t spae_attention_scratch(const AttentionArgs& args, const Extents& extents) {
  return decodes(args, extents) ? DecodePlan(args, extents).floats(args.size) : 0;
}

int64_t spae_attention_backward_scratch(const AttentionBackward& call, const Extents& extents) {
  return BackwardPlan(call, extents).floats;
}

const char* spae_attention(const AttentionForward& call, const Extents& extents, DType dtype,
                           float* scratch, void* stream) {
  if (const char* reason = refusal(call.args, extents, dtype)) return reason;
  const char* error = nullptr;
  with_half_dtype(dtype, [&](auto type) {
    error = spae_forward_of<decltype(type)>(call, extents, scratch, stream);
  });
  return error;
}

const char* spae_attention_backward(const AttentionBackward& call, const Extents& extents,
                                    DType dtype, float* scratch, void* stream) {
  if (const char* reason = refusal(call.args, extents, dtype)) return reason;
  const BackwardPlan plan(call, extents);
  const char* error = nullptr;
  with_half_dtype(dtype, [&](auto type) {
    error = spae_backward_of<decltype(type)>(call, extents, plan, scratch, stream);
  });
  if (error != nullptr) return error;
  StreamLauncher launcher(stream);
  launch_spae_tables(call, extents, plan, scratch, launcher);
  return launcher.error();
}

}  // namespace cuda
}  // namespace speeder
