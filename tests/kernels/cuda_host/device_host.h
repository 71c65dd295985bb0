// The primitives of csrc/cuda/device.h on the host: the thread that asks is a fiber (block.h), and
// shared memory is checked (checked_memory.h). Included by device.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "block.h"

namespace speeder {
namespace cuda {

inline int thread_index() { return host::block().current->index; }
inline int block_threads() { return host::block().threads; }
inline int block_index_x() { return static_cast<int>(host::block().index[0]); }
inline int block_index_y() { return static_cast<int>(host::block().index[1]); }
inline int block_index_z() { return static_cast<int>(host::block().index[2]); }
inline int grid_blocks_x() { return static_cast<int>(host::block().blocks[0]); }
inline int grid_blocks_y() { return static_cast<int>(host::block().blocks[1]); }
inline int grid_blocks_z() { return static_cast<int>(host::block().blocks[2]); }

// The default arguments are the place of the call, for messages and to tell two barriers apart.
inline void sync_block(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  host::block().wait_for_block({"sync_block", file, line});
}

inline void sync_warp(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  host::block().meet_warp(nullptr, 0, {"sync_warp", file, line}, [](char*) {
    host::block().memory.sync_warp(host::block().current->warp);
  });
}

template <typename T>
T shuffle(T value, int source, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  static_assert(sizeof(T) == 4, "a shuffle moves four bytes");
  const char* slots = host::block().meet_warp(&value, sizeof(T), {"shuffle", file, line});
  memcpy(&value, slots + source % host::Block::kLanes * host::Block::kSlotBytes, sizeof(T));
  return value;
}

template <typename T>
T shuffle_xor(T value, int mask, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  static_assert(sizeof(T) == 4, "a shuffle moves four bytes");
  const char* slots = host::block().meet_warp(&value, sizeof(T), {"shuffle_xor", file, line});
  const int source = (thread_index() ^ mask) % host::Block::kLanes;
  memcpy(&value, slots + source * host::Block::kSlotBytes, sizeof(T));
  return value;
}

// --- global memory, which AddressSanitizer watches ---

template <typename V>
V read_global(const V* from) {
  return *from;
}

template <typename V>
void write_global(V* to, const V& value) {
  *to = value;
}

// --- shared memory ---

namespace host {

inline void check(const char* wrong, SharedRange range, int byte, int size) {
  if (wrong != nullptr) {
    block().fail("%s: bytes %d .. %d of the %u from %u on", wrong, byte, byte + size - 1,
                 range.bytes, range.start);
  }
}

inline void check_place(SharedRange range, int byte, int size) {
  check(block().memory.check_place(range.start, range.bytes, byte, size), range, byte, size);
}

}  // namespace host

template <typename V>
V read_shared(SharedRange range, int byte) {
  V value;
  host::check_place(range, byte, sizeof(V));
  host::Block& block = host::block();
  host::check(block.memory.read(*block.current, int64_t{range.start} + byte, sizeof(V), &value),
              range, byte, sizeof(V));
  return value;
}

template <typename V>
void write_shared(SharedRange range, int byte, const V& value) {
  host::check_place(range, byte, sizeof(V));
  host::Block& block = host::block();
  host::check(block.memory.write(*block.current, int64_t{range.start} + byte, sizeof(V), &value),
              range, byte, sizeof(V));
}

// --- asynchronous copies: the bytes land at the wait, and no sooner ---

namespace host {

struct Copy {
  const void* from;  // null: zeros
  SharedRange to;
  int byte;
  int size;
  bool closes_group;  // a mark of commit_copies, not a copy
};

inline void push_copy(const Copy& copy) {
  std::vector<char>& copies = block().current->copies;
  const char* bytes = reinterpret_cast<const char*>(&copy);
  copies.insert(copies.end(), bytes, bytes + sizeof(Copy));
}

inline void land(const Copy& copy) {
  alignas(16) char bytes[16] = {};
  if (copy.from != nullptr) memcpy(bytes, copy.from, copy.size);
  const int64_t at = int64_t{copy.to.start} + copy.byte;
  check(block().memory.land_copy(*block().current, at, copy.size, bytes), copy.to, copy.byte,
        copy.size);
}

inline void start_copy(SharedRange to, int byte, const void* from, int size, bool valid) {
  check_place(to, byte, size);
  if (valid && reinterpret_cast<uintptr_t>(from) % size != 0) {
    block().fail("asynchronous copy of %d bytes from an address that is no multiple of it", size);
  }
  const int64_t at = int64_t{to.start} + byte;
  check(block().memory.start_copy(*block().current, at, size), to, byte, size);
  push_copy({valid ? from : nullptr, to, byte, size, false});
}

}  // namespace host

inline void copy_shared_async16(SharedRange to, int byte, const void* from, bool valid) {
  host::start_copy(to, byte, from, 16, valid);
}

inline void copy_shared_async4(SharedRange to, int byte, const void* from, bool valid) {
  host::start_copy(to, byte, from, 4, valid);
}

inline void commit_copies() { host::push_copy({nullptr, {0, 0}, 0, 0, true}); }

template <int N>
void wait_copies() {
  std::vector<char>& bytes = host::block().current->copies;
  const int count = static_cast<int>(bytes.size() / sizeof(host::Copy));
  std::vector<host::Copy> copies(count);
  if (count > 0) memcpy(copies.data(), bytes.data(), bytes.size());
  int groups = 0;
  for (const host::Copy& copy : copies) groups += copy.closes_group;
  int landed = 0;
  for (int n = 0; n < count && groups > N; ++n) {
    if (copies[n].closes_group) {
      --groups;
      for (; landed < n; ++landed) host::land(copies[landed]);
      landed = n + 1;
    }
  }
  bytes.erase(bytes.begin(), bytes.begin() + landed * static_cast<int>(sizeof(host::Copy)));
}

// --- tiles ---

template <int kCount, bool kTransposed>
void load_matrices(uint32_t (&out)[kCount], SharedRange range, int byte,
                   const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  Vector<uint16_t, 8> row{};
  const int lane = thread_index() % host::Block::kLanes;
  if (lane < 8 * kCount) row = read_shared<Vector<uint16_t, 8>>(range, byte);
  const char* slots = host::block().meet_warp(&row, sizeof(row), {"load_matrices", file, line});
  for (int m = 0; m < kCount; ++m) {
    uint16_t two[2];
    for (int n = 0; n < 2; ++n) {
      const int r = kTransposed ? lane % 4 * 2 + n : lane / 4;
      const int c = kTransposed ? lane / 4 : lane % 4 * 2 + n;
      memcpy(&two[n], slots + (8 * m + r) * host::Block::kSlotBytes + 2 * c, 2);
    }
    memcpy(&out[m], two, 4);
  }
}

namespace host {

struct Fragments {
  float c[4];
  uint32_t a[4];
  uint32_t b[2];
};
static_assert(sizeof(Fragments) <= Block::kSlotBytes, "a slot holds a lane's fragments");

template <typename T>
float element(uint32_t pair, int n) {
  return to_float(T{static_cast<uint16_t>(pair >> (16 * n))});
}

// Every Half, since its conversion is slow where the processor has none.
template <>
inline float element<Half>(uint32_t pair, int n) {
  static const std::vector<float>& values = *[] {
    auto* made = new std::vector<float>(1 << 16);
    for (int bits = 0; bits < 1 << 16; ++bits) {
      (*made)[bits] = to_float(Half{static_cast<uint16_t>(bits)});
    }
    return made;
  }();
  return values[pair >> (16 * n) & 0xFFFF];
}

// From the fragments of all lanes to the tiles, and from the product back: the layout is written
// down here once more, from the manual of the instruction, and not taken from tile_product.h.
template <typename T>
__attribute__((no_sanitize("address", "undefined"))) void multiply_slots(char* slots) {
  float a[16][16], b[16][8], c[16][8];
  for (int lane = 0; lane < Block::kLanes; ++lane) {
    Fragments f;
    memcpy(&f, slots + lane * Block::kSlotBytes, sizeof(f));
    const int group = lane >> 2, within = lane & 3;
    for (int i = 0; i < 8; ++i) {
      const int row = (i < 2 || (i >= 4 && i < 6)) ? group : group + 8;
      const int column = within * 2 + (i & 1) + (i >= 4 ? 8 : 0);
      a[row][column] = element<T>(f.a[i / 2], i % 2);
    }
    for (int i = 0; i < 4; ++i) {
      b[within * 2 + (i & 1) + (i >= 2 ? 8 : 0)][group] = element<T>(f.b[i / 2], i % 2);
      c[i < 2 ? group : group + 8][within * 2 + (i & 1)] = f.c[i];
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < Block::kLanes; ++lane) {
    float out[4];
    for (int i = 0; i < 4; ++i) {
      out[i] = c[(lane >> 2) + (i < 2 ? 0 : 8)][(lane & 3) * 2 + (i & 1)];
    }
    memcpy(slots + lane * Block::kSlotBytes, out, sizeof(out));
  }
}

}  // namespace host

template <typename T>
void multiply_fragments(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                        const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  host::Fragments mine;
  memcpy(mine.c, c, sizeof(c));
  memcpy(mine.a, a, sizeof(a));
  memcpy(mine.b, b, sizeof(b));
  const char* slots = host::block().meet_warp(&mine, sizeof(mine), {"multiply", file, line},
                                              host::multiply_slots<T>);
  memcpy(c, slots + thread_index() % host::Block::kLanes * host::Block::kSlotBytes, sizeof(c));
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
