// Which driver the CUDA runtime needs that is linked into this library, and which one there is.
#include <cuda_runtime.h>

// A plain C function, which Python asks by ctypes: no GPU is touched. Numbers are as CUDA writes
// them, 1000 * major + 10 * minor; `driver` is 0 where there is none.
extern "C" __attribute__((visibility("default"))) void speeder_cuda_versions(int* runtime,
                                                                             int* driver) {
  *runtime = CUDART_VERSION;
  if (cudaDriverGetVersion(driver) != cudaSuccess) *driver = 0;
}
