// Tiny kernels that show what the host layer computes and what it detects; for test_cuda_layer.py.
#include "cuda/common/tile_product.h"
#include "serve.h"

namespace speeder {
namespace cuda {
namespace {

using host::Arguments;

// Every way to load a tile; `way` picks. a is 16 x 16, b 16 x 8 (or 16 x 16 for a pair), c as wide.
template <typename T>
struct Product {
  static constexpr int kThreads = kWarp, kMinBlocks = 1;
  const T* a;
  const T* b;
  float* c;
  int64_t way;

  void operator()() const {
    using Tile = TileProduct<T>;
    constexpr int kStride = 24;
    SharedLayout layout;
    const Shared<T> left = layout.take<T>(16 * kStride), right = layout.take<T>(16 * kStride);
    const bool transposed = way & 1, pair = way & 2, chained = way & 4;
    for (int n = lane(); n < 16 * 16; n += kWarp) {
      const int row = n / 16, column = n % 16;
      left.set(transposed ? column * kStride + row : n / 16 * kStride + column, a[n]);
      right.set(transposed ? column * kStride + row : n / 16 * kStride + column, b[n]);
    }
    sync_warp();
    typename Tile::A fragment =
        transposed ? Tile::load_a_transposed(left, 0, kStride) : Tile::load_a(left, 0, kStride);
    typename Tile::B two[2];
    if (pair) {
      transposed ? Tile::load_b_transposed_pair(two, right, 0, kStride)
                 : Tile::load_b_pair(two, right, 0, kStride);
    } else {
      const int step = transposed ? 8 * kStride : 8;
      for (int n = 0; n < 2; ++n) {
        two[n] = transposed ? Tile::load_b_transposed(right, n * step, kStride)
                            : Tile::load_b(right, n * step, kStride);
      }
    }
    typename Tile::C sums[2];
    for (int n = 0; n < 2; ++n) Tile::multiply(sums[n], fragment, two[n]);
    if (chained) {  // (a b) b
      fragment = Tile::a_from_sums(sums[0], sums[1]);
      for (int n = 0; n < 2; ++n) {
        sums[n] = {};
        Tile::multiply(sums[n], fragment, two[n]);
      }
    }
    for (int n = 0; n < 2; ++n) {
      for (int i = 0; i < 4; ++i) {
        c[SumTile::row(i) * 16 + 8 * n + SumTile::column(i)] = sums[n].at[i];
      }
    }
  }
};

template <typename T>
void product_of(Arguments& arguments, HostLauncher& launcher) {
  const T* a = arguments.pointer<T>();
  const T* b = arguments.pointer<T>();
  float* c = arguments.pointer<float>();
  const int64_t bytes = 2 * 16 * 24 * sizeof(T);
  launcher.launch({1, 1, 1, kWarp, bytes}, Product<T>{a, b, c, arguments.integer()});
}

void product(Arguments& arguments, HostLauncher& launcher) {
  arguments.dtype() == DType::kBFloat16 ? product_of<BFloat16>(arguments, launcher)
                                        : product_of<Half>(arguments, launcher);
}

// out = in, each half in reverse, by a copy to shared memory and back; or with one of these faults.
enum Fault : int64_t {
  kNone,
  kMissingBarrier,
  kMissingWarpBarrier,
  kEarlyExit,
  kTwoBarriers,
  kDivergentShuffle,
  kOutOfBounds,
  kLargerThanLaunched,
  kMisaligned,
  kNeverWritten,
  kTwoWriters,
  kMissingWait,
  kWaitForTooFew,
  kOverwrittenCopy,
  kGlobalOutOfBounds,
  kUnfinishedCopy,
  kUnorderedWrites,
  kUnorderedRead,
};

struct Reverse {
  static constexpr int kThreads = 64, kMinBlocks = 1;
  const float* in;
  float* out;
  int64_t fault;

  void operator()() const {
    const int t = thread_index();
    SharedLayout layout;
    const Shared<float> values = layout.take<float>(kThreads);
    if (fault == kEarlyExit && t == 5) return;
    if (fault == kTwoWriters) values.set(t / 2, in[t]);
    if (!(fault == kNeverWritten && t == 7)) values.set(t, in[t]);
    if (fault == kMissingWarpBarrier || fault == kNone) {
      if (fault == kNone) sync_warp();
      out[t] = values.get(t ^ 1);
    }
    if (fault == kTwoBarriers && t < kWarp) {
      sync_block();
    } else if (fault != kMissingBarrier) {
      sync_block();
    }
    if (fault == kDivergentShuffle && t % 2 == 0) shuffle(1.0f, 0);
    if (fault == kMisaligned) values.get_vector<4>(t % 2);
    if (fault == kLargerThanLaunched) layout.take<float>(1).get(0);
    out[t] = values.get(fault == kOutOfBounds ? t + 1 : kThreads - 1 - t);
    if (fault == kGlobalOutOfBounds) out[t + 1] = 0.0f;
    if (fault == kUnorderedWrites) out[t / 2] = 0.0f;
    if (fault == kUnorderedRead) out[t] += out[t ^ 1];
  }
};

void reverse(Arguments& arguments, HostLauncher& launcher) {
  const float* in = arguments.pointer<float>();
  float* out = arguments.pointer<float>();
  launcher.launch({1, 1, 1, 64, 256}, Reverse{in, out, arguments.integer()});
}

// out = in backwards through asynchronous copies of 16 bytes, two stages of shared memory in turn;
// a chunk past `valid` is zero.
struct Stream {
  static constexpr int kThreads = 32, kMinBlocks = 1, kChunk = kThreads * 4;
  const float* in;
  float* out;
  int64_t chunks;
  int64_t valid;
  int64_t fault;

  void operator()() const {
    SharedLayout layout;
    Shared<float> stages[2];
    for (Shared<float>& stage : stages) stage = layout.take<float>(kChunk);
    copy(stages[0], 0);
    for (int64_t n = 0; n < chunks; ++n) {
      if (fault == kOverwrittenCopy && n == 0) stages[0].set(4 * lane(), 0.0f);
      if (n + 1 < chunks) copy(stages[(n + 1) % 2], n + 1);
      if (fault != kMissingWait) {
        n + 1 < chunks&& fault != kWaitForTooFew ? wait_copies<1>() : wait_copies<0>();
        if (fault == kWaitForTooFew) copy(stages[n % 2], n), wait_copies<1>();
      }
      sync_block();
      for (int i = 0; i < 4; ++i) {
        const int from = kChunk - 1 - (4 * lane() + i);
        out[n * kChunk + 4 * lane() + i] = stages[n % 2].get(from);
      }
      if (fault != kMissingBarrier) sync_block();
    }
    if (fault == kUnfinishedCopy) copy(stages[0], 0);
  }

  void copy(Shared<float> stage, int64_t n) const {
    copy_async16(stage, 4 * lane(), in + n * kChunk + 4 * lane(), n < valid);
    commit_copies();
  }
};

void stream(Arguments& arguments, HostLauncher& launcher) {
  const float* in = arguments.pointer<float>();
  float* out = arguments.pointer<float>();
  const int64_t chunks = arguments.integer(), valid = arguments.integer();
  const int64_t bytes = 2 * Stream::kChunk * sizeof(float);
  launcher.launch({1, 1, 1, 32, bytes}, Stream{in, out, chunks, valid, arguments.integer()});
}

// A launch of any size.
struct Nothing {
  static constexpr int kThreads = 32, kMinBlocks = 1;
  void operator()() const {}
};

void nothing(Arguments& arguments, HostLauncher& launcher) {
  Grid grid;
  for (int64_t* n : {&grid.x, &grid.y, &grid.z, &grid.shared_bytes}) *n = arguments.integer();
  grid.threads = 32;
  launcher.launch(grid, Nothing{});
}

// The sum of `in` in as many ways as there are: over a warp's lanes, and with atomics.
struct Sum {
  static constexpr int kThreads = 128, kMinBlocks = 1;
  const float* in;
  float* lanes;   // (blocks * threads,): each lane's view of its warp's sum
  float* atomic;  // (1,)

  void operator()() const {
    const int64_t t = int64_t{block_index_x()} * block_threads() + thread_index();
    lanes[t] = warp_sum(in[t]);
    atomic_add(atomic, in[t]);
  }
};

void sum(Arguments& arguments, HostLauncher& launcher) {
  const float* in = arguments.pointer<float>();
  float* lanes = arguments.pointer<float>();
  float* atomic = arguments.pointer<float>();
  launcher.launch({arguments.integer(), 1, 1, 128, 0}, Sum{in, lanes, atomic});
}

}  // namespace
}  // namespace cuda
}  // namespace speeder

int main() {
  using namespace speeder::cuda;
  return host::serve({{"product", product},
                      {"reverse", reverse},
                      {"stream", stream},
                      {"nothing", nothing},
                      {"sum", sum}});
}
