// Global memory, in programs that are compiled to tell every access (watch.cpp): two threads, of a
// block or of different ones, that touch the same place with nothing between them that orders the
// two. So a sum that is made with atomics, or by plain additions of several blocks, is found in a
// single run, whatever its bits.
#pragma once

#include <cstdint>
#include <unordered_map>

#include "order.h"

namespace speeder {
namespace cuda {
namespace host {

class WatchedMemory {
 public:
  static constexpr uintptr_t kUnit = 2;  // bytes that are watched together

  explicit WatchedMemory(const Order& order) : order_(order) {}

  void start_launch() { units_.clear(); }

  // Null, or what is wrong.
  const char* touch(const Thread& thread, uintptr_t at, uintptr_t size, bool writes) {
    for (uintptr_t u = at / kUnit; u <= (at + size - 1) / kUnit; ++u) {
      Unit& unit = units_[u];
      if (order_.of_another_block(unit.write)) {
        return writes ? "race in global memory: write to what another block writes"
                      : "race in global memory: read of what another block writes";
      }
      if (order_.unordered(unit.write, thread)) {
        return writes ? "race in global memory: write to what another thread writes"
                      : "race in global memory: read of what another thread writes";
      }
      unit.read_by_another |= order_.of_another_block(unit.read);
      if (!writes) {
        order_.note_read(unit.read, thread);
        continue;
      }
      if (unit.read_by_another) {
        return "race in global memory: write to what another block reads";
      }
      if (order_.unordered(unit.read, thread)) {
        return "race in global memory: write to what another thread reads";
      }
      unit.write = order_.now(thread);
    }
    return nullptr;
  }

 private:
  struct Unit {
    Access write;
    Access read;
    bool read_by_another = false;  // block, before the one that `read` is of
  };

  const Order& order_;
  std::unordered_map<uintptr_t, Unit> units_;
};

}  // namespace host
}  // namespace cuda
}  // namespace speeder
