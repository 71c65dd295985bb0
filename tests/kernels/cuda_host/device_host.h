// The primitives of csrc/cuda/common/device.h on the host: the thread that asks is a fiber of
// engine.h. Included by device.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "engine.h"

namespace speeder {
namespace cuda {

inline int thread_index() { return host::now.thread; }
inline int block_threads() { return host::now.threads; }
inline int block_index_x() { return static_cast<int>(host::now.block[0]); }
inline int block_index_y() { return static_cast<int>(host::now.block[1]); }
inline int block_index_z() { return static_cast<int>(host::now.block[2]); }
inline int grid_blocks_x() { return static_cast<int>(host::now.blocks[0]); }
inline int grid_blocks_y() { return static_cast<int>(host::now.blocks[1]); }
inline int grid_blocks_z() { return static_cast<int>(host::now.blocks[2]); }

// The default arguments are the place of the call, for messages and to tell two barriers apart.
inline void sync_block(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  host::meet_block({"sync_block", file, line});
}

inline void sync_warp(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  host::meet_warp_in_order({"sync_warp", file, line});
}

template <typename T>
T shuffle(T value, int source, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  static_assert(sizeof(T) == 4, "a shuffle moves four bytes");
  const char* slots = host::meet_warp(&value, sizeof(T), {"shuffle", file, line});
  memcpy(&value, slots + source % kWarp * host::kSlotBytes, sizeof(T));
  return value;
}

template <typename T>
T shuffle_xor(T value, int mask, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  static_assert(sizeof(T) == 4, "a shuffle moves four bytes");
  const char* slots = host::meet_warp(&value, sizeof(T), {"shuffle_xor", file, line});
  memcpy(&value, slots + (thread_index() ^ mask) % kWarp * host::kSlotBytes, sizeof(T));
  return value;
}

// Global memory: AddressSanitizer watches it.
template <typename V>
V read_global(const V* from) {
  return *from;
}

template <typename V>
void write_global(V* to, const V& value) {
  *to = value;
}

template <typename V>
V read_shared(SharedRange range, int byte) {
  V value;
  host::read(range, byte, sizeof(V), &value);
  return value;
}

template <typename V>
void write_shared(SharedRange range, int byte, const V& value) {
  host::write(range, byte, sizeof(V), &value);
}

// The bytes are read and land at the wait, and no sooner.
inline void copy_shared_async16(SharedRange to, int byte, const void* from, bool valid) {
  if (valid && reinterpret_cast<uintptr_t>(from) % 16 != 0) {
    host::fail("copy_async16 from an address that is no multiple of 16");
  }
  host::start_copy({valid ? from : nullptr, to, byte, 16});
}

inline void copy_shared_async4(SharedRange to, int byte, const void* from, bool valid) {
  host::start_copy({valid ? from : nullptr, to, byte, 4});
}

inline void commit_copies() { host::commit_copies(); }

template <int N>
void wait_copies() {
  while (const host::Copy* copy = host::next_copy(N)) {
    Vector<uint64_t, 2> bytes{};
    if (copy->from != nullptr && copy->size == 16) {
      bytes = *static_cast<const Vector<uint64_t, 2>*>(copy->from);
    } else if (copy->from != nullptr) {
      bytes.at[0] = *static_cast<const uint32_t*>(copy->from);
    }
    host::land_copy(&bytes);
  }
}

template <int kCount, bool kTransposed>
void load_matrices(uint32_t (&out)[kCount], SharedRange range, int byte,
                   const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  Vector<uint16_t, 8> row{};
  const int lane = thread_index() % kWarp;
  if (lane < 8 * kCount) row = read_shared<Vector<uint16_t, 8>>(range, byte);
  const char* slots = host::meet_warp(&row, sizeof(row), {"load_matrices", file, line});
  for (int m = 0; m < kCount; ++m) {
    uint16_t two[2];
    for (int n = 0; n < 2; ++n) {
      const int r = kTransposed ? lane % 4 * 2 + n : lane / 4;
      const int c = kTransposed ? lane / 4 : lane % 4 * 2 + n;
      memcpy(&two[n], slots + (8 * m + r) * host::kSlotBytes + 2 * c, 2);
    }
    memcpy(&out[m], two, 4);
  }
}

template <typename T>
void multiply_fragments(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                        const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  host::Fragments mine;
  memcpy(mine.c, c, sizeof(c));
  memcpy(mine.a, a, sizeof(a));
  memcpy(mine.b, b, sizeof(b));
  const char* slots =
      host::meet_warp(&mine, sizeof(mine), {"multiply", file, line}, host::multiply_slots<T>);
  memcpy(c, slots + thread_index() % kWarp * host::kSlotBytes, sizeof(c));
}

inline float exp2_fast(float x) { return std::exp2(x); }

template <typename T>
uint32_t round_pair(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

// Threads and blocks run in an order drawn from the seed, so sums made this way differ with it.
inline void atomic_add(float* to, float value) { *to += value; }

}  // namespace cuda
}  // namespace speeder
