// compress_items on a GPU: its kernels, compiled, and their launch on a stream.
#include "cuda/common/stream_launcher.cuh"
#include "cuda/compress_items/backward.cuh"

namespace speeder {
namespace cuda {

const char* compress_items(const CompressForward& call, DType dtype, void* stream) {
  StreamLauncher launcher(stream);
  launch_compress_items(call, dtype, launcher);
  return launcher.error();
}

const char* compress_items_backward(const CompressBackward& call, float* scratch, DType dtype,
                                    void* stream) {
  StreamLauncher launcher(stream);
  launch_compress_items_backward(call, scratch, dtype, launcher);
  return launcher.error();
}

}  // namespace cuda
}  // namespace speeder
