// How threads take turns at a sum: each waits until the one before it is far enough. Builtins,
// since what std::atomic's functions are compiled to for one instruction set must not be linked
// into the code for another.
#pragma once

#include <sched.h>

#include <cstdint>

namespace speeder {
namespace {

// Waits until `place` has been lowered to `most`, and sees what was written before that.
inline void wait_for(const int64_t* place, int64_t most) {
  while (__atomic_load_n(place, __ATOMIC_ACQUIRE) > most) sched_yield();
}

inline void lower(int64_t* place, int64_t to) { __atomic_store_n(place, to, __ATOMIC_RELEASE); }

}  // namespace
}  // namespace speeder
