// Runs csrc/cuda/pack_tokens/kernels.cuh on the host, for test_cuda_on_host.py.
#include "cuda/pack_tokens/kernels.cuh"
#include "serve.h"

namespace speeder {
namespace cuda {
namespace {

void pack(host::Arguments& arguments, HostLauncher& launcher) {
  const DType dtype = arguments.dtype();
  PackArgs args{};
  args.input_ids = arguments.pointer<int64_t>();
  args.text_embedding = arguments.pointer<void>();
  args.item_tokens = arguments.pointer<void>();
  args.item_rows = arguments.pointer<int64_t>();
  args.ranks = arguments.pointer<int64_t>();
  args.position_prompts = arguments.pointer<void>();
  args.out = arguments.pointer<void>();
  args.tokens = arguments.integer();
  args.hidden = arguments.integer();
  PackTables tables{};
  tables.vocabulary = arguments.integer();
  tables.items = arguments.integer();
  tables.prompts = arguments.integer();
  launch_pack_tokens(args, tables, dtype, launcher);
}

void sum(host::Arguments& arguments, HostLauncher& launcher) {
  const DType dtype = arguments.dtype();
  SumArgs args{};
  args.grad = arguments.pointer<void>();
  args.order = arguments.pointer<int64_t>();
  args.starts = arguments.pointer<int64_t>();
  args.out = arguments.pointer<void>();
  args.rows = arguments.integer();
  args.hidden = arguments.integer();
  launch_sum_rows(args, dtype, launcher);
}

}  // namespace
}  // namespace cuda
}  // namespace speeder

int main() {
  using namespace speeder::cuda;
  return host::serve({{"pack_tokens", pack}, {"sum_rows", sum}});
}
