// The most that this machine's cores multiply with the tiles of our kernels: prints GFLOP/s of all
// threads together, the best of several rounds. Built for one instruction set by peak.py.
// Usage: peak float32|bfloat16 THREADS SECONDS
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "cpu/common/isa.h"
#include "cpu/common/tile_product.h"

namespace {

using namespace speeder::SPEEDER_ISA;
using Clock = std::chrono::steady_clock;

constexpr int64_t kRows = 96;  // of the left operand: whole tiles, whatever their height

// Operands of c (kRows x columns) = a (kRows x lanes) b (lanes x columns), all in a core's caches.
template <typename P>
struct Operands {
  Operands(int64_t lanes, int64_t columns) : lanes(lanes), columns(columns) {
    a = make<P>(kRows * lanes);
    b = make<P>(lanes * columns);
    c = make<float>(kRows * columns);
  }
  ~Operands() { std::free(a), std::free(b), std::free(c); }

  template <typename T>
  static T* make(int64_t size) {
    void* out = std::aligned_alloc(64, round_up(size * sizeof(T), 64));
    __builtin_memset(out, 0, size * sizeof(T));
    return static_cast<T*>(out);
  }

  void multiply(TileRegisters& registers) {
    for (int64_t r = 0; r < kRows; r += kTileRows) {
      product<false>(registers, kTileRows, columns / kWidth, lanes, a + r * lanes, lanes, b,
                     columns, c + r * columns, columns, false);
    }
  }

  double flops() const { return 2.0 * kRows * lanes * kInLane<P> * columns; }

  int64_t lanes, columns;
  P* a;
  P* b;
  float* c;
};

// All threads start together and work for `seconds`; returns what they did, in GFLOP/s.
template <typename P>
double round_of(int threads, double seconds, int64_t lanes, int64_t columns) {
  std::atomic<int> ready{0};
  std::vector<double> rates(threads);
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t) {
    pool.emplace_back([&, t] {
      TileRegisters registers;
      Operands<P> operands(lanes, columns);
      operands.multiply(registers);
      ready.fetch_add(1);
      while (ready.load() < threads) std::this_thread::yield();
      const auto start = Clock::now();
      double spent = 0, flops = 0;
      while (spent < seconds) {
        for (int n = 0; n < 16; ++n) operands.multiply(registers);
        flops += 16 * operands.flops();
        spent = std::chrono::duration<double>(Clock::now() - start).count();
      }
      rates[t] = flops / spent / 1e9;
    });
  }
  double total = 0;
  for (int t = 0; t < threads; ++t) {
    pool[t].join();
    total += rates[t];
  }
  return total;
}

// The best over the operands' places: the right one in the first cache, or as attention has it in
// the second.
template <typename P>
double peak(int threads, double seconds) {
  const int64_t shapes[][2] = {{64, 64}, {64, 128}, {64, 256}, {256, 64}};
  double best = 0;
  for (int round = 0; round < 5; ++round) {
    for (const auto& shape : shapes) {
      const double rate = round_of<P>(threads, seconds / 20, shape[0], shape[1]);
      if (rate > best) best = rate;
    }
  }
  return best;
}

}  // namespace

int main(int argc, char** argv) {
  const bool halves = argc == 4 && std::strcmp(argv[1], "bfloat16") == 0;
  if (argc != 4 || (!halves && std::strcmp(argv[1], "float32") != 0)) {
    std::fprintf(stderr, "usage: peak float32|bfloat16 THREADS SECONDS\n");
    return 2;
  }
  const int threads = std::atoi(argv[2]);
  const double seconds = std::atof(argv[3]);
#if defined(__AMX_BF16__)
  if (!halves || speeder::best_instruction_set() != speeder::Isa::kAvx512Amx) {
    std::fprintf(stderr, "peak: AMX multiplies no float32, or is not granted\n");
    return 1;
  }
#else
  if (!halves) std::printf("%.2f\n", peak<Packed<float>>(threads, seconds));
#endif
  if (halves) std::printf("%.2f\n", peak<Packed<speeder::BFloat16>>(threads, seconds));
}
