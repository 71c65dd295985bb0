// Multiplies packed matrices of many shapes with the tiles of one instruction set. Operands end
// where a page begins that may not be touched, all that is not an operand is NaN, and results must
// be exact: elements are small whole numbers. Prints how many sums were checked; 1 if any is wrong.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <random>

#include "cpu/common/isa.h"
#include "cpu/common/tile_product.h"

namespace {

using namespace speeder;
using namespace speeder::SPEEDER_ISA;

// `count` of T, NaN, with pages around that may not be touched: the last one directly behind them.
template <typename T>
class Guarded {
 public:
  explicit Guarded(int64_t count) {
    const int64_t page = sysconf(_SC_PAGESIZE), bytes = count * sizeof(T);
    const int64_t inner = round_up(bytes, page);
    whole_ = inner + 2 * page;
    base_ = static_cast<char*>(
        mmap(nullptr, whole_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    __builtin_memset(base_, 0xFF, whole_);
    mprotect(base_, page, PROT_NONE);
    mprotect(base_ + page + inner, page, PROT_NONE);
    data_ = reinterpret_cast<T*>(base_ + page + inner - bytes);
  }
  ~Guarded() { munmap(base_, whole_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  T* get() const { return data_; }

 private:
  char* base_;
  int64_t whole_;
  T* data_;
};

std::mt19937 generator(1);
int64_t below(int64_t count) { return static_cast<int64_t>(generator() % count); }
float small_number() { return static_cast<float>(below(17) - 8); }

// A lane of random elements, and the sum of two lanes' products.
void fill(float* lane) { *lane = small_number(); }
void fill(Pair* lane) {
  lane->first = from_float<BFloat16>(small_number());
  lane->second = from_float<BFloat16>(small_number());
}
float multiply(float a, float b) { return a * b; }
float multiply(Pair a, Pair b) {
  return to_float(a.first) * to_float(b.first) + to_float(a.second) * to_float(b.second);
}

struct Count {
  int64_t checked = 0, wrong = 0;
};

template <bool kTransposed, typename P>
void check(TileRegisters& registers, int64_t rows, int64_t vecs, int64_t depth, Count& count) {
  const bool add = below(2) == 1;
  const int64_t columns = vecs * kWidth, lda = (kTransposed ? rows : depth) + below(9);
  const int64_t ldb = columns + kWidth * below(3), ldc = columns + below(20);
  const int64_t a_rows = kTransposed ? depth : rows, a_columns = kTransposed ? rows : depth;
  const Guarded<P> a((a_rows - 1) * lda + a_columns), b((depth - 1) * ldb + columns);
  const int64_t c_size = (rows - 1) * ldc + columns;
  const Guarded<float> c(c_size);
  for (int64_t i = 0; i < a_rows; ++i) {
    for (int64_t j = 0; j < a_columns; ++j) fill(a.get() + i * lda + j);
  }
  for (int64_t d = 0; d < depth; ++d) {
    for (int64_t j = 0; j < columns; ++j) fill(b.get() + d * ldb + j);
  }
  for (int64_t r = 0; add && r < rows; ++r) {
    for (int64_t j = 0; j < columns; ++j) c.get()[r * ldc + j] = static_cast<float>(r - j);
  }
  product<kTransposed>(registers, rows, vecs, depth, a.get(), lda, b.get(), ldb, c.get(), ldc, add);
  for (int64_t at = 0; at < c_size; ++at) {
    const int64_t r = at / ldc, j = at % ldc;
    float sum = add ? static_cast<float>(r - j) : 0.0f;
    for (int64_t d = 0; d < depth && j < columns; ++d) {
      sum += multiply(a.get()[kTransposed ? d * lda + r : r * lda + d], b.get()[d * ldb + j]);
    }
    const float found = c.get()[at];
    count.checked += 1;
    count.wrong += j < columns ? found != sum : !std::isnan(found);
  }
}

}  // namespace

int main() {
  best_instruction_set();  // asks for AMX
  Count count;
  TileRegisters registers;
  for (int n = 0; n < 1000; ++n) {
    const int64_t rows = 1 + below(kTileRows), vecs = 1 + below(9);
    const int64_t depth = 1 + below(n % 10 == 0 ? 200 : 70);
    if (n % 2 == 0) {
      check<false, Packed<BFloat16>>(registers, rows, vecs, depth, count);
    } else {
      check<true, Packed<BFloat16>>(registers, rows, vecs, depth, count);
    }
  }
  std::printf("%lld checked, %lld wrong\n", static_cast<long long>(count.checked),
              static_cast<long long>(count.wrong));
  return count.wrong == 0 ? 0 : 1;
}
