// The device layer: what kernels are written over, so that one source compiles for a GPU (nvcc)
// and, in tests, for the host (g++), where it runs block by block with every access to shared
// memory and every barrier checked. device_gpu.h and tests/kernels/cuda_host/device_host.h give the
// primitives:
//
//   thread_index, block_threads, block_index_x/y/z, grid_blocks_x/y/z
//   sync_block, sync_warp                  barriers that every thread of the block or warp reaches
//   shuffle, shuffle_xor                   a 4-byte value of another lane; all 32 lanes take part
//   read_shared, write_shared, copy_shared_async16, copy_shared_async4, commit_copies, wait_copies
//   exp2_fast                              2^x as the special function unit gives it
//   round_pair                             two floats to one register of two-byte elements
//   load_matrices, multiply_fragments      ldmatrix and mma.sync, for tile_product.h
//   atomic_add                             for nothing but the fault that a test plants
//
// Blocks are one-dimensional in threads and hold whole warps. Global memory may be read and written
// through raw pointers too.
//
// A kernel is a struct of its arguments: `static constexpr int kThreads` (the most threads of a
// block) and `kMinBlocks` (those that a multiprocessor is to hold at once), and an `operator()`
// that is the code of one thread. stream_launcher.cuh runs it on a stream,
// cuda_host/host_launcher.h on the host.
#pragma once

#include <cstdint>

#include "dtype.h"

#ifdef __CUDACC__
#define SPEEDER_UNROLL _Pragma("unroll")
#define SPEEDER_ROLLED _Pragma("unroll 1")
#else
#define SPEEDER_UNROLL
#define SPEEDER_ROLLED
#endif

namespace speeder {
namespace cuda {

constexpr int kWarp = 32;         // lanes
constexpr int kVectorBytes = 16;  // the widest access of a thread

// N elements that load and store as one access.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T at[N];
};

template <typename T>
constexpr int kVector = kVectorBytes / static_cast<int>(sizeof(T));  // elements of the widest one

// Part of the block's shared memory, in bytes.
struct SharedRange {
  uint32_t start;
  uint32_t bytes;
};

// A launch: blocks in x, y and z, the threads of each and its bytes of shared memory.
struct Grid {
  int64_t x = 1;
  int64_t y = 1;
  int64_t z = 1;
  int threads = 0;
  int64_t shared_bytes = 0;
};

}  // namespace cuda
}  // namespace speeder

#ifdef __CUDACC__
#include "cuda/common/device_gpu.h"
#else
#include "device_host.h"
#endif

namespace speeder {
namespace cuda {

SPEEDER_DEVICE int lane() { return thread_index() % kWarp; }
SPEEDER_DEVICE int warp() { return thread_index() / kWarp; }

// `count` elements of shared memory. Indices count elements; those of vectors are multiples of N.
template <typename T>
class Shared {
  static_assert(sizeof(T) % 2 == 0, "the host checks shared memory in units of two bytes");

 public:
  SPEEDER_HOST_DEVICE constexpr Shared() : range_{0, 0} {}
  SPEEDER_HOST_DEVICE constexpr Shared(SharedRange range) : range_(range) {}

  SPEEDER_DEVICE T get(int i) const { return read_shared<T>(range_, i * int(sizeof(T))); }
  SPEEDER_DEVICE void set(int i, T x) const { write_shared<T>(range_, i * int(sizeof(T)), x); }

  template <int N>
  SPEEDER_DEVICE Vector<T, N> get_vector(int i) const {
    return read_shared<Vector<T, N>>(range_, i * int(sizeof(T)));
  }
  template <int N>
  SPEEDER_DEVICE void set_vector(int i, const Vector<T, N>& x) const {
    write_shared<Vector<T, N>>(range_, i * int(sizeof(T)), x);
  }

  // Elements first .. first + count - 1 as a view of their own, within which the host keeps them.
  SPEEDER_HOST_DEVICE constexpr Shared part(int first, int count) const {
    return SharedRange{range_.start + first * static_cast<uint32_t>(sizeof(T)),
                       count * static_cast<uint32_t>(sizeof(T))};
  }

  SPEEDER_HOST_DEVICE constexpr SharedRange range() const { return range_; }

 private:
  SharedRange range_;
};

// Starts to copy 16 bytes from global memory to `to`, from element `i` on, past the registers;
// zeros where not `valid`, and then `from` is not read. They are there after wait_copies<N>(),
// which leaves at most the N last groups (each closed by commit_copies) on their way; for other
// threads, after a barrier too.
template <typename T>
SPEEDER_DEVICE void copy_async16(Shared<T> to, int i, const T* from, bool valid) {
  copy_shared_async16(to.range(), i * int(sizeof(T)), from, valid);
}

// The same for one element of 4 bytes, wherever it lies.
template <typename T>
SPEEDER_DEVICE void copy_async4(Shared<T> to, int i, const T* from, bool valid) {
  static_assert(sizeof(T) == 4, "one element of four bytes");
  copy_shared_async4(to.range(), i * int(sizeof(T)), from, valid);
}

// Deals out the block's shared memory, in the kernel and in its launcher alike, which so learns how
// much there is to ask for.
class SharedLayout {
 public:
  template <typename T>
  SPEEDER_HOST_DEVICE constexpr Shared<T> take(int64_t count) {
    const int64_t start = bytes_, bytes = count * static_cast<int64_t>(sizeof(T));
    bytes_ += (bytes + kVectorBytes - 1) / kVectorBytes * kVectorBytes;
    return SharedRange{static_cast<uint32_t>(start), static_cast<uint32_t>(bytes)};
  }

  SPEEDER_HOST_DEVICE constexpr int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
};

// Over the lanes of a warp; all of them get the same bits.
SPEEDER_DEVICE float warp_sum(float x) {
  SPEEDER_UNROLL
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

SPEEDER_DEVICE float warp_max(float x) {
  SPEEDER_UNROLL
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const float other = shuffle_xor(x, mask);
    x = other > x ? other : x;
  }
  return x;
}

}  // namespace cuda
}  // namespace speeder
