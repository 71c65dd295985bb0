// Fibers: one for each thread of a block, all on one thread of the host, each with a stack of its
// own. On x86-64 a switch is a dozen instructions; swapcontext, which serves other processors, asks
// the kernel for the signal mask each time.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

// Where AddressSanitizer watches the kernels: what includes this is compiled without it.
extern "C" __attribute__((weak)) void __asan_unpoison_memory_region(const volatile void*, size_t);

namespace speeder {
namespace cuda {
namespace host {

#if defined(__x86_64__)

// What a fiber that does not run needs: the registers a call must preserve lie on its stack.
struct Context {
  void* stack_pointer = nullptr;
};

__attribute__((naked, noinline, unused)) static void swap_stacks(void**, void*) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}

inline void switch_context(Context& from, Context& to) {
  swap_stacks(&from.stack_pointer, to.stack_pointer);
}

inline void start_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  // As swap_stacks leaves a stack: six registers, where to return to, and, since `entry` is reached
  // by a return and not by a call, a stack that is eight bytes off a multiple of sixteen.
  void** top = reinterpret_cast<void**>(stack + bytes) - 1;
  top[0] = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int n = 0; n < 6; ++n) *--top = nullptr;
  context.stack_pointer = top;
}

#else

struct Context {
  ucontext_t at;
};

inline void switch_context(Context& from, Context& to) { swapcontext(&from.at, &to.at); }

inline void start_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context.at);
  context.at.uc_stack.ss_sp = stack;
  context.at.uc_stack.ss_size = bytes;
  context.at.uc_link = nullptr;
  makecontext(&context.at, entry, 0);
}

#endif

// Memory for stacks, with a page between them that must not be touched.
class Stacks {
 public:
  static constexpr size_t kBytes = 256 * 1024;

  explicit Stacks(int count) : count_(count), page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
    void* memory = mmap(nullptr, count_ * (kBytes + page_), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) abort();
    memory_ = static_cast<char*>(memory);
    for (int n = 0; n < count_; ++n) mprotect(stack(n) - page_, page_, PROT_NONE);
  }
  Stacks(const Stacks&) = delete;

  char* stack(int n) const { return memory_ + n * (kBytes + page_) + page_; }

  bool hold(uintptr_t at) const {
    const uintptr_t first = reinterpret_cast<uintptr_t>(memory_);
    return at >= first && at < first + count_ * (kBytes + page_);
  }

  // A fiber that is given up leaves what AddressSanitizer marked in its frames.
  void forget(int n) const {
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(stack(n), kBytes);
  }

 private:
  int count_;
  size_t page_;
  char* memory_;
};

}  // namespace host
}  // namespace cuda
}  // namespace speeder
