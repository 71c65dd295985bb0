// What gcc calls before every access to memory with -fsanitize=thread, in the place of
// ThreadSanitizer's own library, which knows no fibers and no blocks: the engine looks at each.
#include <cstddef>
#include <cstdint>

#include "cuda/common/device.h"

namespace {

void touch(const void* at, size_t size, bool writes) {
  speeder::cuda::host::touch(reinterpret_cast<uintptr_t>(at), size, writes);
}

}  // namespace

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

void __tsan_read1(void* at) { touch(at, 1, false); }
void __tsan_read2(void* at) { touch(at, 2, false); }
void __tsan_read4(void* at) { touch(at, 4, false); }
void __tsan_read8(void* at) { touch(at, 8, false); }
void __tsan_read16(void* at) { touch(at, 16, false); }
void __tsan_read_range(void* at, size_t size) { touch(at, size, false); }
void __tsan_write1(void* at) { touch(at, 1, true); }
void __tsan_write2(void* at) { touch(at, 2, true); }
void __tsan_write4(void* at) { touch(at, 4, true); }
void __tsan_write8(void* at) { touch(at, 8, true); }
void __tsan_write16(void* at) { touch(at, 16, true); }
void __tsan_write_range(void* at, size_t size) { touch(at, size, true); }

}  // extern "C"
