// pack_tokens on a GPU: its kernels, compiled, and their launch on a stream.
#include "cuda/common/stream_launcher.cuh"
#include "cuda/pack_tokens/kernels.cuh"

namespace speeder {
namespace cuda {

const char* pack_tokens(const PackArgs& args, const PackTables& tables, DType dtype, void* stream) {
  StreamLauncher launcher(stream);
  launch_pack_tokens(args, tables, dtype, launcher);
  return launcher.error();
}

const char* sum_rows(const SumArgs& args, DType dtype, void* stream) {
  StreamLauncher launcher(stream);
  launch_sum_rows(args, dtype, launcher);
  return launcher.error();
}

}  // namespace cuda
}  // namespace speeder
