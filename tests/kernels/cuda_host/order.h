// When who touches a place in memory, and which accesses have nothing between them that orders
// them.
//
// Time is counted in epochs: one begins with every block and at every barrier of one, and within it
// a warp counts its own at every sync_warp. Two accesses of a block's threads are ordered if they
// fall into different epochs of the block, or the threads share a warp whose epochs differ. Blocks
// of a launch are never ordered.
#pragma once

#include <cstdint>

namespace speeder {
namespace cuda {
namespace host {

struct Thread {
  int index = 0;
  int warp = 0;
};

struct Access {
  uint32_t epoch = 0;
  uint32_t warp_epoch = 0;
  int16_t thread = -1;  // or one of Order's numbers for several
  int16_t warp = 0;
};

class Order {
 public:
  static constexpr int kWarpsMost = 32;

  void start_launch() { launch_epoch_ = epoch_ + 1; }
  void start_block() { block_epoch_ = ++epoch_; }
  void sync_block() { ++epoch_; }
  void sync_warp(int warp) { ++warp_epochs_[warp]; }

  bool of_this_block(const Access& access) const { return access.epoch >= block_epoch_; }
  bool of_another_block(const Access& access) const {
    return access.epoch >= launch_epoch_ && access.epoch < block_epoch_;
  }

  // Whether nothing orders an earlier access of this block and one that `thread` makes now.
  bool unordered(const Access& earlier, const Thread& thread) const {
    if (earlier.epoch != epoch_ || earlier.thread == thread.index) return false;
    const bool warp_between = earlier.thread != kWarps && earlier.warp == thread.warp &&
                              earlier.warp_epoch != warp_epochs_[thread.warp];
    return !warp_between;
  }

  void note_read(Access& read, const Thread& thread) const {
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

  Access now(const Thread& thread) const {
    return {epoch_, warp_epochs_[thread.warp], static_cast<int16_t>(thread.index),
            static_cast<int16_t>(thread.warp)};
  }

 private:
  enum : int16_t { kLanes = -2, kWarps = -3 };  // several lanes of one warp; lanes of several warps

  uint32_t epoch_ = 0;
  uint32_t block_epoch_ = 1, launch_epoch_ = 1;  // the first of this block, and of this launch
  uint32_t warp_epochs_[kWarpsMost] = {};
};

}  // namespace host
}  // namespace cuda
}  // namespace speeder
