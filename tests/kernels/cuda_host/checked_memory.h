// The block's shared memory, with what a GPU does not tell: accesses outside of a view, reads of
// what was never written or is still being copied, and two threads that touch the same place with
// nothing between them that orders the two.
//
// Time is counted in epochs: one begins at every barrier of the block, and within it a warp counts
// its own at every sync_warp. Two accesses of different threads conflict if one of them writes and
// they fall into one epoch of the block, unless the threads share a warp and its epochs differ.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace speeder {
namespace cuda {
namespace host {

struct Thread {
  int index = 0;
  int warp = 0;
};

class CheckedMemory {
 public:
  static constexpr int kUnit = 2;  // bytes that are watched together
  static constexpr int kWarpsMost = 32;

  void start_block(int64_t bytes) {
    bytes_ = bytes;
    if (static_cast<int64_t>(data_.size()) < bytes) {
      data_.resize(bytes);
      units_.resize(bytes / kUnit);
    }
    first_epoch_ = ++epoch_;
  }
  void sync_block() { ++epoch_; }
  void sync_warp(int warp) { ++warp_epochs_[warp]; }

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
      if (unit.write.epoch < first_epoch_) return "read of never-written shared memory";
      if (unit.in_flight) return "read of shared memory whose asynchronous copy was not waited for";
      if (conflict(unit.write, thread)) return "race: read of what another thread writes";
      note_read(unit.read, thread);
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
  enum : int16_t { kNobody = -1, kLanes = -2, kWarps = -3 };  // kLanes: several of one warp

  struct Access {
    uint32_t epoch = 0;
    uint32_t warp_epoch = 0;
    int16_t thread = kNobody;
    int16_t warp = 0;
  };
  struct Unit {
    Access write;
    Access read;
    bool in_flight = false;
  };

  bool conflict(const Access& earlier, const Thread& thread) const {
    if (earlier.epoch != epoch_ || earlier.thread == thread.index) return false;
    const bool warp_between = earlier.thread != kWarps && earlier.warp == thread.warp &&
                              earlier.warp_epoch != warp_epochs_[thread.warp];
    return !warp_between;
  }

  void note_read(Access& read, const Thread& thread) {
    const Access mine = now(thread);
    if (read.epoch != epoch_) {
      read = mine;
    } else if (read.thread == kWarps || read.warp != thread.warp) {
      read.thread = kWarps;
    } else if (read.warp_epoch != mine.warp_epoch) {
      read = mine;  // the earlier ones of this warp are ordered before
    } else if (read.thread != thread.index) {
      read.thread = kLanes;
    }
  }

  const char* note_write(Unit& unit, const Thread& thread) {
    if (unit.in_flight && unit.write.epoch >= first_epoch_) {
      return "write to shared memory that is still being copied to";
    }
    if (conflict(unit.write, thread)) return "race: write to what another thread writes";
    if (conflict(unit.read, thread)) return "race: write to what another thread reads";
    unit.in_flight = false;
    unit.write = now(thread);
    return nullptr;
  }

  Access now(const Thread& thread) const {
    return {epoch_, warp_epochs_[thread.warp], static_cast<int16_t>(thread.index),
            static_cast<int16_t>(thread.warp)};
  }

  int64_t bytes_ = 0;
  std::vector<unsigned char> data_;
  std::vector<Unit> units_;
  uint32_t epoch_ = 0;
  uint32_t first_epoch_ = 1;  // of this block
  uint32_t warp_epochs_[kWarpsMost] = {};
};

}  // namespace host
}  // namespace cuda
}  // namespace speeder
