// The block's shared memory, with what a GPU does not tell: accesses outside of a view, reads of
// what was never written or is still being copied, and two threads that touch the same place with
// nothing between them that orders the two.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "order.h"

namespace speeder {
namespace cuda {
namespace host {

class CheckedMemory {
 public:
  static constexpr int kUnit = 2;  // bytes that are watched together

  explicit CheckedMemory(const Order& order) : order_(order) {}

  void start_block(int64_t bytes) {
    bytes_ = bytes;
    if (static_cast<int64_t>(data_.size()) < bytes) {
      data_.resize(bytes);
      units_.resize(bytes / kUnit);
    }
  }

  // Each returns null, or what is wrong; `unit` is then the place.
  const char* check_place(uint32_t start, uint32_t bytes, int64_t at, int64_t size) const {
    if (int64_t{start} + bytes > bytes_) {
      return "shared memory view larger than what was asked for at launch";
    }
    if (at < 0 || at + size > bytes) return "shared memory access out of bounds";
    if ((start + at) % size != 0) return "misaligned shared memory access";
    return nullptr;
  }

  const char* read(const Thread& thread, int64_t at, int64_t size, void* to) {
    for (int64_t u = at / kUnit; u < (at + size) / kUnit; ++u) {
      Unit& unit = units_[u];
      if (!order_.of_this_block(unit.write)) return "read of never-written shared memory";
      if (unit.in_flight) return "read of shared memory whose asynchronous copy was not waited for";
      if (order_.unordered(unit.write, thread)) return "race: read of what another thread writes";
      order_.note_read(unit.read, thread);
    }
    memcpy(to, data_.data() + at, size);
    return nullptr;
  }

  const char* write(const Thread& thread, int64_t at, int64_t size, const void* from) {
    for (int64_t u = at / kUnit; u < (at + size) / kUnit; ++u) {
      const char* wrong = note_write(units_[u], thread);
      if (wrong != nullptr) return wrong;
    }
    memcpy(data_.data() + at, from, size);
    return nullptr;
  }

  // An asynchronous copy is a write when it starts and when it lands, and nothing to read between.
  const char* start_copy(const Thread& thread, int64_t at, int64_t size) {
    for (int64_t u = at / kUnit; u < (at + size) / kUnit; ++u) {
      const char* wrong = note_write(units_[u], thread);
      if (wrong != nullptr) return wrong;
      units_[u].in_flight = true;
    }
    return nullptr;
  }

  const char* land_copy(const Thread& thread, int64_t at, int64_t size, const void* from) {
    for (int64_t u = at / kUnit; u < (at + size) / kUnit; ++u) units_[u].in_flight = false;
    return write(thread, at, size, from);
  }

 private:
  struct Unit {
    Access write;
    Access read;
    bool in_flight = false;
  };

  const char* note_write(Unit& unit, const Thread& thread) {
    if (unit.in_flight && order_.of_this_block(unit.write)) {
      return "write to shared memory that is still being copied to";
    }
    if (order_.unordered(unit.write, thread)) return "race: write to what another thread writes";
    if (order_.unordered(unit.read, thread)) return "race: write to what another thread reads";
    unit.in_flight = false;
    unit.write = order_.now(thread);
    return nullptr;
  }

  const Order& order_;
  int64_t bytes_ = 0;
  std::vector<unsigned char> data_;
  std::vector<Unit> units_;
};

}  // namespace host
}  // namespace cuda
}  // namespace speeder
