// Memory for vectors, and work that threads take part by part. Included by the files that share
// work out; they are built once, without an instruction set of their own.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

#include "cpu/common/parallel.h"

namespace speeder {

// Floats at an address that suits every vector.
class Buffer {
 public:
  explicit Buffer(int64_t floats)
      : data_(static_cast<float*>(::operator new(floats * sizeof(float), kAlignment))) {}
  float* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Delete {
    void operator()(float* p) const { ::operator delete(p, kAlignment); }
  };
  std::unique_ptr<float, Delete> data_;
};

// Runs body(part, scratch) for every part. A thread takes the next part when it is done with one,
// so a thread that is held up holds up nobody; what a part sums does not depend on who runs it.
template <typename Run>
void run_parts(int64_t parts, int64_t threads, int64_t scratch_floats,
               const ParallelFor& parallel_for, const Run& body) {
  std::atomic<int64_t> next{0};
  parallel_for(std::min(parts, threads), 1, [&](int64_t, int64_t) {
    const Buffer scratch(scratch_floats);
    for (int64_t part = next++; part < parts; part = next++) body(part, scratch.get());
  });
}

}  // namespace speeder
