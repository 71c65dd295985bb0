// The functions of engine.h, over a block (block.h), and the product of tiles.
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <vector>

#include "block.h"

namespace speeder {
namespace cuda {
namespace host {

Now now{};

void seed(uint64_t seed) { block().seed(seed); }
uint32_t random_below(uint32_t limit) { return block().random(limit); }

const char* run_block(void (*body)(const void*), const void* kernel, int threads,
                      int64_t shared_bytes) {
  return block().run(body, kernel, threads, shared_bytes) ? nullptr : block().error.c_str();
}

void start_launch() { block().start_launch(); }

void meet_block(const Where& where) { block().meet_block(where); }

char* meet_warp(const void* mine, int bytes, const Where& where, void (*combine)(char* slots)) {
  return block().meet_warp(mine, bytes, where, combine);
}

void meet_warp_in_order(const Where& where) {
  block().meet_warp(nullptr, 0, where,
                    [](char*) { block().order.sync_warp(block().current->warp); });
}

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  block().give_up(text);
}

namespace {

void check(const char* wrong, SharedRange range, int byte, int size) {
  if (wrong == nullptr) return;
  fail("%s: bytes %d .. %d of the %u from %u on", wrong, byte, byte + size - 1, range.bytes,
       range.start);
}

// Where in the block's memory; fails where that is not within the range.
int64_t place(SharedRange range, int byte, int size) {
  check(block().memory.check_place(range.start, range.bytes, byte, size), range, byte, size);
  return int64_t{range.start} + byte;
}

}  // namespace

void read(SharedRange range, int byte, int size, void* to) {
  const int64_t at = place(range, byte, size);
  check(block().memory.read(*block().current, at, size, to), range, byte, size);
}

void write(SharedRange range, int byte, int size, const void* from) {
  const int64_t at = place(range, byte, size);
  check(block().memory.write(*block().current, at, size, from), range, byte, size);
}

void touch(uintptr_t at, uintptr_t size, bool writes) {
  if (!block().touches_global(at)) return;
  const char* wrong = block().global.touch(*block().current, at, size, writes);
  if (wrong != nullptr) fail("%s", wrong);
}

void start_copy(const Copy& copy) {
  Block::Fiber& fiber = *block().current;
  const int64_t at = place(copy.to, copy.byte, copy.size);
  check(block().memory.start_copy(fiber, at, copy.size), copy.to, copy.byte, copy.size);
  fiber.copies.push_back(copy);
  ++fiber.open;
}

void commit_copies() {
  Block::Fiber& fiber = *block().current;
  fiber.groups.push_back(fiber.open);
  fiber.open = 0;
}

const Copy* next_copy(int groups) {
  Block::Fiber& fiber = *block().current;
  while (static_cast<int>(fiber.groups.size()) > groups) {
    if (fiber.groups.front() > 0) return &fiber.copies.front();
    fiber.groups.erase(fiber.groups.begin());
  }
  return nullptr;
}

void land_copy(const void* bytes) {
  Block::Fiber& fiber = *block().current;
  const Copy copy = fiber.copies.front();
  fiber.copies.erase(fiber.copies.begin());
  --fiber.groups.front();
  const int64_t at = int64_t{copy.to.start} + copy.byte;
  check(block().memory.land_copy(fiber, at, copy.size, bytes), copy.to, copy.byte, copy.size);
}

namespace {

template <typename T>
float element(uint32_t pair, int n) {
  return to_float(T{static_cast<uint16_t>(pair >> (16 * n))});
}

// Every Half, since its conversion is slow where the processor has none.
template <>
float element<Half>(uint32_t pair, int n) {
  static const std::vector<float>& values = *[] {
    auto* made = new std::vector<float>(1 << 16);
    for (int bits = 0; bits < 1 << 16; ++bits) {
      (*made)[bits] = to_float(Half{static_cast<uint16_t>(bits)});
    }
    return made;
  }();
  return values[pair >> (16 * n) & 0xFFFF];
}

}  // namespace

// From the fragments of all lanes to the tiles, and from the product back: the layout is written
// down here once more, from the manual of the instruction, and not taken from tile_product.h.
template <typename T>
void multiply_slots(char* slots) {
  float a[16][16], b[16][8], c[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    Fragments f;
    memcpy(&f, slots + lane * kSlotBytes, sizeof(f));
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
  for (int lane = 0; lane < kWarp; ++lane) {
    float out[4];
    for (int i = 0; i < 4; ++i) {
      out[i] = c[(lane >> 2) + (i < 2 ? 0 : 8)][(lane & 3) * 2 + (i & 1)];
    }
    memcpy(slots + lane * kSlotBytes, out, sizeof(out));
  }
}

template void multiply_slots<BFloat16>(char*);
template void multiply_slots<Half>(char*);

}  // namespace host
}  // namespace cuda
}  // namespace speeder
