// What runs a block: its threads as fibers, its shared memory, and what is wrong with either.
// Compiled once and without the sanitizers (engine.cpp), which are for the kernels and would only
// slow it.
#pragma once

#include <cstdint>

#include "cuda/common/device.h"

namespace speeder {
namespace cuda {
namespace host {

constexpr int kSlotBytes = 64;  // that a lane may bring to where its warp meets

// The thread that runs.
struct Now {
  int thread;
  int threads;
  int64_t block[3];
  int64_t blocks[3];
};
extern Now now;

// Where in the source a thread waits.
struct Where {
  const char* what;
  const char* file;
  int line;
};

void seed(uint64_t seed);
uint32_t random_below(uint32_t limit);

void start_launch();

// Runs the block that `now` names, `threads` times `body(kernel)`; null, or what is wrong.
const char* run_block(void (*body)(const void*), const void* kernel, int threads,
                      int64_t shared_bytes);

void meet_block(const Where& where);

// Every lane brings `bytes` from `mine`; the last to come calls `combine` (where there is one) on
// all that came. Each gets the slots of the warp, which stay until it has met once more.
char* meet_warp(const void* mine, int bytes, const Where& where,
                void (*combine)(char* slots) = nullptr);
void meet_warp_in_order(const Where& where);  // and orders its accesses to shared memory

// Says what is wrong and gives the block up: does not return, though the compiler is not told.
void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// `size` bytes from `byte` on, within `range`, in one access.
void read(SharedRange range, int byte, int size, void* to);
void write(SharedRange range, int byte, int size, const void* from);

// An access to any memory, in a program that tells them all.
void touch(uintptr_t at, uintptr_t size, bool writes);

// An asynchronous copy of 16 or 4 bytes: null for zeros. What has landed is no longer waited for.
struct Copy {
  const void* from;
  SharedRange to;
  int byte;
  int size;
};
void start_copy(const Copy& copy);
void commit_copies();
// The next copy to land so that at most `groups` groups are left on their way; null if none is.
const Copy* next_copy(int groups);
void land_copy(const void* bytes);

// The product of all lanes' fragments, as mma.sync takes them, for meet_warp.
struct Fragments {
  float c[4];
  uint32_t a[4];
  uint32_t b[2];
};
template <typename T>
void multiply_slots(char* slots);

}  // namespace host
}  // namespace cuda
}  // namespace speeder
