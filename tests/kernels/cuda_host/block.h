// One block at a time: runs its threads as fibers, in an order drawn from a seed, from one point at
// which they wait for each other to the next, and tells which thread did what is wrong. Only
// engine.cpp includes this.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "checked_memory.h"
#include "cuda/common/device.h"
#include "fiber.h"
#include "order.h"
#include "watched_memory.h"

namespace speeder {
namespace cuda {
namespace host {

inline bool operator!=(const Where& a, const Where& b) {
  return a.line != b.line || a.what != b.what || a.file != b.file;
}

inline std::string text(const Where& where) {
  const std::string path(where.file);
  return std::string(where.what) + " at " + path.substr(path.rfind('/') + 1) + ":" +
         std::to_string(where.line);
}

class Block {
 public:
  static constexpr int kThreadsMost = 1024;

  struct Fiber : Thread {
    enum State { kReady, kAtBarrier, kAtWarp, kEnded };

    Context context;
    State state = kEnded;
    Where where{};
    bool started = false;
    int warp_turn = 0;         // collectives of the warp that were passed
    std::vector<Copy> copies;  // on their way, oldest first
    std::vector<int> groups;   // how many of them each closed group has
    int open = 0;              // and how many are in none yet
  };

  Order order;
  CheckedMemory memory{order};
  WatchedMemory global{order};

  Block() : stacks_(kThreadsMost), fibers_(kThreadsMost), warps_(kThreadsMost / kWarp) {
    for (int n = 0; n < kThreadsMost; ++n) {
      fibers_[n].index = n;
      fibers_[n].warp = n / kWarp;
    }
  }

  void seed(uint64_t seed) { random_ = seed * 0x9E3779B97F4A7C15u + 0x2545F4914F6CDD1Du; }
  uint32_t random(uint32_t below) {
    random_ ^= random_ << 13;
    random_ ^= random_ >> 7;
    random_ ^= random_ << 17;
    return static_cast<uint32_t>((random_ >> 32) * below >> 32);
  }

  // Runs the block; returns whether all went well, else `error` says what did not.
  bool run(void (*body)(const void*), const void* kernel, int thread_count, int64_t shared_bytes) {
    now.threads = threads = thread_count;
    body_ = body;
    kernel_ = kernel;
    at_barrier_ = ended_ = 0;
    order.start_block();
    memory.start_block(shared_bytes);
    ready_.clear();
    for (int n = 0; n < threads; ++n) {
      Fiber& fiber = fibers_[n];
      if (!fiber.started) {
        stacks_.forget(n);
        start_context(fiber.context, stacks_.stack(n), Stacks::kBytes, enter);
        fiber.started = true;
      }
      fiber.state = Fiber::kReady;
      fiber.warp_turn = 0;
      fiber.copies.clear();
      fiber.groups.clear();
      fiber.open = 0;
      ready_.push_back(n);
    }
    for (Warp& warp : warps_) warp.arrived = 0;
    error.clear();
    if (Fiber* first = pick()) {
      start(first);
      switch_context(main_, first->context);
      current = nullptr;
    }
    if (error.empty() && ended_ < threads) error = place(-1) + stuck();
    if (!error.empty()) {
      for (Fiber& fiber : fibers_) fiber.started = false;  // whatever they were at is given up
    }
    return error.empty();
  }

  void meet_block(const Where& where) {
    if (at_barrier_ == 0) barrier_ = where;
    if (barrier_ != where) {
      fail("barrier in divergent code: others wait in %s, this thread in %s",
           text(barrier_).c_str(), text(where).c_str());
    }
    current->state = Fiber::kAtBarrier;
    current->where = where;
    if (++at_barrier_ == threads) {
      order.sync_block();
      at_barrier_ = 0;
      for (int n = 0; n < threads; ++n) wake(n);
    }
    yield();
  }

  char* meet_warp(const void* mine, int bytes, const Where& where, void (*combine)(char* slots)) {
    Warp& warp = warps_[current->warp];
    if (warp.arrived == 0) warp.where = where;
    if (warp.where != where) {
      fail("warp in divergent code: other lanes wait in %s, this one in %s",
           text(warp.where).c_str(), text(where).c_str());
    }
    char* slots = warp.slots[current->warp_turn++ % 2];
    if (bytes > 0) memcpy(slots + current->index % kWarp * kSlotBytes, mine, bytes);
    current->state = Fiber::kAtWarp;
    current->where = where;
    if (++warp.arrived == kWarp) {
      if (combine != nullptr) combine(slots);
      warp.arrived = 0;
      for (int n = 0; n < kWarp; ++n) wake(current->warp * kWarp + n);
    }
    yield();
    return slots;
  }

  // Does not return.
  void give_up(const char* wrong) {
    error = place(current->index) + wrong;
    switch_context(current->context, main_);
  }

  void start_launch() {
    order.start_launch();
    global.start_launch();
  }

  // Whether a thread of the block accesses what is not on its own stack.
  bool touches_global(uintptr_t at) const { return current != nullptr && !stacks_.hold(at); }

  Fiber* current = nullptr;  // null outside of run()
  std::string error;

 private:
  struct Warp {
    int arrived = 0;
    Where where{};
    alignas(16) char slots[2][kWarp * kSlotBytes];
  };

  // A fiber's whole life: one block after the other.
  static void enter();

  void live() {
    for (;;) {
      body_(kernel_);
      if (!current->copies.empty()) give_up("ended before its asynchronous copies were waited for");
      current->state = Fiber::kEnded;
      ++ended_;
      yield();
    }
  }

  void wake(int n) {
    fibers_[n].state = Fiber::kReady;
    ready_.push_back(n);
  }

  Fiber* pick() {
    if (ready_.empty()) return nullptr;
    const uint32_t place = random(static_cast<uint32_t>(ready_.size()));
    Fiber* fiber = &fibers_[ready_[place]];
    ready_[place] = ready_.back();
    ready_.pop_back();
    return fiber;
  }

  void start(Fiber* fiber) {
    current = fiber;
    now.thread = fiber->index;
  }

  // On to another thread that can go on; back to run() where there is none.
  void yield() {
    Fiber* const from = current;
    Fiber* const to = pick();
    if (to == from) return;
    if (to != nullptr) start(to);
    switch_context(from->context, to == nullptr ? main_ : to->context);
  }

  std::string place(int thread) const {
    std::string name = "block (";
    for (int n = 0; n < 3; ++n) name += (n > 0 ? ", " : "") + std::to_string(now.block[n]);
    return name + (thread < 0 ? "): " : "), thread " + std::to_string(thread) + ": ");
  }

  // No thread can go on, and not all have ended.
  std::string stuck() const {
    std::string found = "not every thread reaches a barrier:";
    const char* separator = " ";
    for (int state : {Fiber::kAtBarrier, Fiber::kAtWarp, Fiber::kEnded}) {
      int count = 0, first = 0;
      for (int n = threads - 1; n >= 0; --n) {
        if (fibers_[n].state == state) ++count, first = n;
      }
      if (count == 0) continue;
      found += separator + std::to_string(count) + " (thread " + std::to_string(first) + ", ...) ";
      found +=
          state == Fiber::kEnded ? "have ended" : "wait in " + host::text(fibers_[first].where);
      separator = ", ";
    }
    return found;
  }

  Stacks stacks_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::vector<int> ready_;
  Context main_;
  void (*body_)(const void*) = nullptr;
  const void* kernel_ = nullptr;
  int at_barrier_ = 0;
  int ended_ = 0;
  int threads = 0;
  Where barrier_{};
  uint64_t random_ = 1;
};

// The one that runs: a host program runs one kernel at a time.
inline Block& block() {
  static Block* const only = new Block;
  return *only;
}

inline void Block::enter() { block().live(); }

}  // namespace host
}  // namespace cuda
}  // namespace speeder
