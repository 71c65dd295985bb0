// One block at a time: runs its threads as fibers, in an order drawn from a seed, from one point at
// which they wait for each other to the next, and tells which thread did what is wrong.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "checked_memory.h"
#include "fiber.h"

namespace speeder {
namespace cuda {
namespace host {

// Where in the source a thread waits.
struct Where {
  const char* what;
  const char* file;
  int line;

  bool operator!=(const Where& other) const {
    return line != other.line || what != other.what || file != other.file;
  }
  std::string text() const {
    const std::string path(file);
    return std::string(what) + " at " + path.substr(path.rfind('/') + 1) + ":" +
           std::to_string(line);
  }
};

class Block {
 public:
  static constexpr int kThreadsMost = 1024;
  static constexpr int kLanes = 32;
  static constexpr int kSlotBytes = 64;

  struct Fiber : Thread {
    enum State { kReady, kAtBarrier, kAtWarp, kEnded };

    Context context;
    State state = kEnded;
    Where where{};
    bool started = false;
    int warp_turn = 0;         // collectives of the warp that were passed
    std::vector<char> copies;  // see device_host.h
  };

  CheckedMemory memory;
  int64_t index[3] = {};
  int64_t blocks[3] = {};
  int threads = 0;

  Block() : stacks_(kThreadsMost), fibers_(kThreadsMost), warps_(kThreadsMost / kLanes) {
    for (int n = 0; n < kThreadsMost; ++n) {
      fibers_[n].index = n;
      fibers_[n].warp = n / kLanes;
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
    threads = thread_count;
    body_ = body;
    kernel_ = kernel;
    at_barrier_ = ended_ = 0;
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
      ready_.push_back(n);
    }
    for (Warp& warp : warps_) warp.arrived = 0;
    error.clear();
    if (Fiber* first = pick()) {
      current = first;
      switch_context(main_, first->context);
    }
    if (error.empty() && ended_ < threads) error = place(-1) + stuck();
    if (!error.empty()) {
      for (Fiber& fiber : fibers_) fiber.started = false;  // whatever they were at is given up
    }
    return error.empty();
  }

  void wait_for_block(const Where& where) {
    if (at_barrier_ == 0) barrier_ = where;
    if (barrier_ != where) {
      fail("barrier in divergent code: others wait in %s, this thread in %s",
           barrier_.text().c_str(), where.text().c_str());
    }
    current->state = Fiber::kAtBarrier;
    current->where = where;
    if (++at_barrier_ == threads) {
      memory.sync_block();
      at_barrier_ = 0;
      for (int n = 0; n < threads; ++n) wake(n);
    }
    yield();
  }

  // Every lane brings `bytes` from `mine`; the last to come calls `combine` (where there is one) on
  // all that came; each gets the warp's slots, which stay until it comes here twice more.
  char* meet_warp(const void* mine, int bytes, const Where& where,
                  void (*combine)(char* slots) = nullptr) {
    Warp& warp = warps_[current->warp];
    if (warp.arrived == 0) warp.where = where;
    if (warp.where != where) {
      fail("warp in divergent code: other lanes wait in %s, this one in %s",
           warp.where.text().c_str(), where.text().c_str());
    }
    char* slots = warp.slots[current->warp_turn++ % 2];
    if (bytes > 0) memcpy(slots + current->index % kLanes * kSlotBytes, mine, bytes);
    current->state = Fiber::kAtWarp;
    current->where = where;
    if (++warp.arrived == kLanes) {
      if (combine != nullptr) combine(slots);
      warp.arrived = 0;
      for (int n = 0; n < kLanes; ++n) wake(current->warp * kLanes + n);
    }
    yield();
    return slots;
  }

  // Says what is wrong and gives the block up: does not return.
  void fail(const char* format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    error = place(current->index) + text;
    switch_context(current->context, main_);
  }

  Fiber* current = nullptr;
  std::string error;

 private:
  struct Warp {
    int arrived = 0;
    Where where{};
    alignas(16) char slots[2][kLanes * kSlotBytes];
  };

  // A fiber's whole life: one block after the other.
  static void enter();

  void live() {
    for (;;) {
      body_(kernel_);
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

  // On to another thread that can go on; back to run() where there is none.
  void yield() {
    Fiber* const from = current;
    Fiber* const to = pick();
    if (to == from) return;
    if (to != nullptr) current = to;
    switch_context(from->context, to == nullptr ? main_ : to->context);
  }

  std::string place(int thread) const {
    char text[128];
    int length =
        snprintf(text, sizeof(text), "block (%lld, %lld, %lld)", static_cast<long long>(index[0]),
                 static_cast<long long>(index[1]), static_cast<long long>(index[2]));
    if (thread >= 0) snprintf(text + length, sizeof(text) - length, ", thread %d", thread);
    return std::string(text) + ": ";
  }

  // No thread can go on, and not all have ended.
  std::string stuck() const {
    std::string text = "not every thread reaches a barrier:";
    const char* separator = " ";
    for (int state : {Fiber::kAtBarrier, Fiber::kAtWarp, Fiber::kEnded}) {
      int count = 0, first = 0;
      for (int n = threads - 1; n >= 0; --n) {
        if (fibers_[n].state == state) ++count, first = n;
      }
      if (count == 0) continue;
      text += separator + std::to_string(count) + " (thread " + std::to_string(first) + ", ...) ";
      text += state == Fiber::kEnded ? "have ended" : "wait in " + fibers_[first].where.text();
      separator = ", ";
    }
    return text;
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
