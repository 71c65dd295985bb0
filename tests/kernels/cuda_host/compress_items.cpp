// Runs csrc/cuda/compress_items/*.cuh on the host, for test_cuda_on_host.py.
#include "cuda/compress_items/backward.cuh"
#include "serve.h"

namespace speeder {
namespace cuda {
namespace {

CompressArgs take_args(host::Arguments& arguments) {
  CompressArgs args{};
  args.experts = arguments.pointer<void>();
  args.logits = arguments.pointer<float>();
  args.present = arguments.pointer<bool>();
  args.weight = arguments.pointer<float>();
  args.items = arguments.integer();
  args.modalities = arguments.integer();
  args.size = arguments.integer();
  args.eps = static_cast<float>(arguments.real());
  return args;
}

void forward(host::Arguments& arguments, HostLauncher& launcher) {
  const DType dtype = arguments.dtype();
  CompressForward call{};
  call.args = take_args(arguments);
  call.tokens = arguments.pointer<void>();
  call.gates = arguments.pointer<float>();
  launch_compress_items(call, dtype, launcher);
}

void backward(host::Arguments& arguments, HostLauncher& launcher) {
  const DType dtype = arguments.dtype();
  CompressBackward call{};
  call.args = take_args(arguments);
  call.grad_tokens = arguments.pointer<void>();
  call.grad_gates = arguments.pointer<float>();
  call.grad_experts = arguments.pointer<void>();
  call.grad_logits = arguments.pointer<float>();
  call.grad_weight = arguments.pointer<float>();
  std::vector<float> scratch(call.grad_weight ? compress_scratch_floats(call.args) : 0, NAN);
  launch_compress_items_backward(call, scratch.data(), dtype, launcher);
}

}  // namespace
}  // namespace cuda
}  // namespace speeder

int main() {
  using namespace speeder::cuda;
  return host::serve({{"compress_items", forward}, {"compress_items_backward", backward}});
}
