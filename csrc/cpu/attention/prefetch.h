// Fetches the tensors of a coming task into the cache, a few tokens at a time between tiles of
// work. Included once for each instruction set.
#pragma once

#include "cpu/attention/tasks.h"
#include "cpu/common/vec.h"

namespace speeder {
namespace SPEEDER_ISA {
namespace {

// kLevel: 3 for all caches, 2 for all but the first.
template <int kLevel>
inline void fetch(const void* data, int64_t bytes) {
  constexpr int64_t kLine = 64;
  const char* p = static_cast<const char*>(data);
  for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(p + at, 0, kLevel);
}

// Up to eight tensors, the same tokens of each.
class Prefetch {
 public:
  // `heads` neighbouring heads of `size` elements of type T, for tokens first .. first + count - 1.
  template <typename T>
  void add(const TokenView& view, int64_t first, int64_t count, int64_t head, int64_t heads,
           int64_t size) {
    const T* data = static_cast<const T*>(view.data);
    if (data == nullptr) return;
    data += first * view.token_stride + head * view.head_stride;
    const int64_t used = (heads - 1) * view.head_stride + size;
    parts_[parts_used_++] = {reinterpret_cast<const char*>(data), view.token_stride * kBytes<T>,
                             used * kBytes<T>, count};
  }

  // The next `tokens` tokens of each tensor.
  void advance(int64_t tokens) {
    for (int64_t n = 0; n < parts_used_; ++n) {
      const Part& part = parts_[n];
      const int64_t end = smaller(part.count, done_ + tokens);
      for (int64_t t = done_; t < end; ++t) fetch<2>(part.data + t * part.stride, part.bytes);
    }
    done_ += tokens;
  }

 private:
  struct Part {
    const char* data;
    int64_t stride, bytes, count;
  };

  template <typename T>
  static constexpr int64_t kBytes = sizeof(T);

  Part parts_[8];
  int64_t parts_used_ = 0, done_ = 0;
};

}  // namespace
}  // namespace SPEEDER_ISA
}  // namespace speeder
