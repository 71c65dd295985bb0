// Runs csrc/cuda/attention/*.cuh on the host, for test_spae_attention_cuda_on_host.py. SPEEDER_TYPE
// is the element type and SPEEDER_SIZES the head sizes to compile for, smallest first: all of them
// for all types would take long.
#include <type_traits>

#include "cuda/attention/kernel_launches.cuh"
#include "serve.h"

namespace speeder {
namespace cuda {
namespace {

TokenView take_view(host::Arguments& arguments) {
  void* data = arguments.pointer<void>();
  const int64_t offset = arguments.integer(), token_stride = arguments.integer();
  return {static_cast<SPEEDER_TYPE*>(data) + offset, token_stride, arguments.integer()};
}

AttentionArgs take_args(host::Arguments& arguments) {
  AttentionArgs args{};
  args.q = take_view(arguments);
  args.k = take_view(arguments);
  args.v = take_view(arguments);
  args.cu_q = arguments.pointer<int32_t>();
  args.cu_k = arguments.pointer<int32_t>();
  args.rank_q = arguments.pointer<int32_t>();
  args.rank_k = arguments.pointer<int32_t>();
  args.relative = arguments.pointer<float>();
  args.absolute = arguments.pointer<float>();
  args.sequences = arguments.integer();
  args.heads = arguments.integer();
  args.kv_heads = arguments.integer();
  args.size = arguments.integer();
  args.buckets = arguments.integer();
  args.positions = arguments.integer();
  args.scale = static_cast<float>(arguments.real());
  args.causal = arguments.integer() != 0;
  return args;
}

Extents take_extents(host::Arguments& arguments) {
  const int64_t tokens_q = arguments.integer(), tokens_k = arguments.integer();
  const int64_t longest_q = arguments.integer();
  return {tokens_q, tokens_k, longest_q, arguments.integer()};
}

// Calls `f` with the first of kSizes that holds `size`, as a type.
template <int kSize, int... kSizes, typename F>
void with_size(int64_t size, F&& f) {
  if constexpr (sizeof...(kSizes) > 0) {
    if (size > kSize) return with_size<kSizes...>(size, f);
  }
  f(std::integral_constant<int, kSize>{});
}

void forward(host::Arguments& arguments, HostLauncher& launcher) {
  AttentionForward call{};
  call.args = take_args(arguments);
  const Extents extents = take_extents(arguments);
  call.out = arguments.pointer<void>();
  call.lse = arguments.pointer<float>();
  const int64_t floats =
      decodes(call.args, extents) ? DecodePlan(call.args, extents).floats(call.args.size) : 0;
  std::vector<float> scratch(floats, NAN);
  with_size<SPEEDER_SIZES>(call.args.size, [&](auto size) {
    launch_spae_forward<SPEEDER_TYPE, decltype(size)::value>(call, extents, scratch.data(),
                                                             launcher);
  });
}

void backward(host::Arguments& arguments, HostLauncher& launcher) {
  AttentionBackward call{};
  call.args = take_args(arguments);
  const Extents extents = take_extents(arguments);
  call.grad = take_view(arguments);
  call.out = arguments.pointer<void>();
  call.lse = arguments.pointer<float>();
  call.grad_q = arguments.pointer<void>();
  call.grad_k = arguments.pointer<void>();
  call.grad_v = arguments.pointer<void>();
  call.grad_relative = arguments.pointer<float>();
  call.grad_absolute = arguments.pointer<float>();
  const BackwardPlan plan(call, extents);
  std::vector<float> scratch(plan.floats, NAN);
  with_size<SPEEDER_SIZES>(call.args.size, [&](auto size) {
    launch_spae_grads<SPEEDER_TYPE, decltype(size)::value>(call, extents, plan, scratch.data(),
                                                           launcher);
  });
  launch_spae_tables(call, extents, plan, scratch.data(), launcher);
}

}  // namespace
}  // namespace cuda
}  // namespace speeder

int main() {
  using namespace speeder::cuda;
  return host::serve({{"forward", forward}, {"backward", backward}});
}
