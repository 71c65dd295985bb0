// Vectors of floats in GCC's vector extension, as wide as the instruction set at hand: loads and
// stores that convert, selection, sums, a transpose and 2^x. Included only by files that setup.py
// builds once for each instruction set (SPEEDER_ISA); everything has internal linkage, so that the
// linker cannot mix the copies up.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "dtype.h"

namespace speeder {
namespace SPEEDER_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef int32_t Ints __attribute__((vector_size(kWidth * 4)));
typedef uint32_t Bits __attribute__((vector_size(kWidth * 4)));
typedef uint16_t Shorts __attribute__((vector_size(kWidth * 2)));

constexpr float kInfinity = __builtin_inff();

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t clamp(int64_t x, int64_t low, int64_t high) { return smaller(larger(x, low), high); }
inline int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

inline Vec splat(float x) { return x - Vec{}; }

// 0, 1, 2, ...; written out, because GCC folds no vector that a loop fills.
inline Ints lanes() {
#if defined(__AVX512F__)
  return Ints{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif defined(__AVX2__)
  return Ints{0, 1, 2, 3, 4, 5, 6, 7};
#else
  return Ints{0, 1, 2, 3};
#endif
}

// A vector reinterpreted; both have the same size.
template <typename To, typename From>
inline To bitcast(const From& x) {
  static_assert(sizeof(To) == sizeof(From), "bitcast keeps the size");
  To out;
  __builtin_memcpy(&out, &x, sizeof(out));
  return out;
}

inline Vec load(const float* p) {
  Vec out;
  __builtin_memcpy(&out, p, sizeof(out));
  return out;
}

inline Vec load(const BFloat16* p) {
#if defined(__AVX512F__)  // GCC would convert two halves of it
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return bitcast<Vec>(bitcast<Bits>(_mm512_maskz_cvtepu16_epi32(0xFFFF, half)) << 16);
#else
  Shorts half;
  __builtin_memcpy(&half, p, sizeof(half));
  return bitcast<Vec>(__builtin_convertvector(half, Bits) << 16);
#endif
}

inline Vec load(const Half* p) {
#if defined(__AVX512F__)
  return bitcast<Vec>(
      _mm512_maskz_cvtph_ps(0xFFFF, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
  return bitcast<Vec>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  Vec out;
  for (int i = 0; i < kWidth; ++i) out[i] = to_float(p[i]);
  return out;
#endif
}

inline void store(float* p, Vec x) { __builtin_memcpy(p, &x, sizeof(x)); }

// Round to nearest, ties to even; a NaN stays a quiet NaN. (AVX-512-BF16 gives 0 for numbers below
// 2^-126.)
inline void store(BFloat16* p, Vec x) {
#if defined(__AVX512BF16__)
  const auto half = _mm512_cvtneps_pbh(bitcast<__m512>(x));
#else
  const Bits bits = bitcast<Bits>(x);
  const Bits rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const Bits out = x == x ? rounded : ((bits >> 16) | 0x40u);
#if defined(__AVX512F__)
  const __m256i half = _mm512_maskz_cvtepi32_epi16(0xFFFF, bitcast<__m512i>(out));
#else
  const Shorts half = __builtin_convertvector(out, Shorts);
#endif
#endif
  __builtin_memcpy(p, &half, sizeof(half));
}

inline void store(Half* p, Vec x) {
#if defined(__AVX512F__)
  const __m256i half = _mm512_maskz_cvtps_ph(0xFFFF, bitcast<__m512>(x), _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
#elif defined(__F16C__)
  const __m128i half = _mm256_cvtps_ph(bitcast<__m256>(x), _MM_FROUND_TO_NEAREST_INT);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
#else
  for (int i = 0; i < kWidth; ++i) p[i] = from_float<Half>(x[i]);
#endif
}

// The first `count` lanes; the others are zero, and are not read.
template <typename T>
inline Vec load_part(const T* p, int64_t count) {
  Vec out = {};
  for (int64_t i = 0; i < count; ++i) out[i] = to_float(p[i]);
  return out;
}

template <typename T>
inline void store_part(T* p, Vec x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = from_float<T>(x[i]);
}

// The same, held in a register: GCC would load an operand from memory for each use of it.
inline Vec in_register(Vec x) {
#if defined(__x86_64__)
  __asm__("" : "+v"(x));
#endif
  return x;
}

// Calls body(d, count) for each vector of a row of `size` elements, count being kWidth but for the
// last one.
template <typename Body>
inline void for_vectors(int64_t size, const Body& body) {
  const int64_t whole = size / kWidth * kWidth;
  for (int64_t d = 0; d < whole; d += kWidth) body(d, kWidth);
  if (whole < size) body(whole, size - whole);
}

template <typename T>
inline Vec load_row(const T* p, int64_t count) {
  return count == kWidth ? load(p) : load_part(p, count);
}

template <typename T>
inline void store_row(T* p, Vec x, int64_t count) {
  if (count == kWidth) {
    store(p, x);
  } else {
    store_part(p, x, count);
  }
}

// out = in (float) times `factor`, `size` elements.
template <typename T>
inline void store_row(T* out, const float* in, int64_t size, float factor) {
  const int64_t whole = size / kWidth * kWidth;
  for (int64_t d = 0; d < whole; d += kWidth) store(out + d, load(in + d) * factor);
  if (whole < size) store_part(out + whole, load(in + whole) * factor, size - whole);
}

// A store that leaves the caches to others; p aligned to a vector of T. Other threads may rely on
// it after finish_streams() only.
template <typename T>
inline void stream(T* p, Vec x) {
  T row[kWidth];
  store(row, x);
#if defined(__AVX2__)
  if constexpr (sizeof(row) == sizeof(__m128i)) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), bitcast<__m128i>(row));
  } else if constexpr (sizeof(row) == sizeof(__m256i)) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bitcast<__m256i>(row));
  }
#if defined(__AVX512F__)
  if constexpr (sizeof(row) == sizeof(__m512i)) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bitcast<__m512i>(row));
  }
#endif
#else
  __builtin_memcpy(p, row, sizeof(row));
#endif
}

// Whether rows of `size` elements are written so: where a vector never sticks out of a row, and the
// output is so large that whoever reads it next would not find its beginning in the caches anyway.
// Then the cache need not read what is overwritten.
template <typename T>
inline bool streamed(const void* out, int64_t rows, int64_t size) {
  constexpr int64_t kLine = 64, kStreamedBytes = int64_t{1} << 20;
  const int64_t bytes = size * static_cast<int64_t>(sizeof(T));
  const bool aligned = reinterpret_cast<uintptr_t>(out) % kLine == 0 && bytes % kLine == 0;
  return aligned && rows * bytes > kStreamedBytes;
}

// Writes a vector of a row; `count` is kWidth where the output is streamed.
template <bool kStream, typename T>
inline void write(T* p, Vec x, int64_t count) {
  if (kStream) {
    stream(p, x);
  } else {
    store_row(p, x, count);
  }
}

inline void finish_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Whether any lane is not zero.
inline bool any(Ints x) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(bitcast<__m512i>(x), bitcast<__m512i>(x)) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256(bitcast<__m256i>(x), bitcast<__m256i>(x));
#else
  int32_t bits = 0;
  for (int i = 0; i < kWidth; ++i) bits |= x[i];
  return bits != 0;
#endif
}

inline Vec largest(Vec a, Vec b) { return a > b ? a : b; }

// All lanes into one by `combine`, halves onto each other: a fixed order.
template <typename Combine>
inline float reduce(Vec x, Combine combine) {
#pragma GCC unroll 4
  for (int step = kWidth / 2; step > 0; step /= 2) {
    x = combine(x, __builtin_shuffle(x, lanes() ^ step));
  }
  return x[0];
}

inline float sum(Vec x) {
  return reduce(x, [](Vec a, Vec b) { return a + b; });
}

inline float largest(Vec x) {
  return reduce(x, [](Vec a, Vec b) { return largest(a, b); });
}

// A polynomial in x by its coefficients, from the highest power down to x itself; then 1.
template <typename... Rest>
inline Vec polynomial(Vec x, float highest, Rest... rest) {
  Vec sum = splat(highest);
  ((sum = sum * x + rest), ...);
  return sum * x + 1.0f;
}

// 2^x for x <= 127: zero below 2^-126, NaN for NaN. Denormal numbers would be of no use in any sum
// here, and every operation on one takes Intel's processors some hundred cycles. 2^x = 2^n * 2^f
// with n whole; 2^f by a polynomial through 1 at 0 with the least relative error, 2e-9.
inline Vec exp2(Vec x) {
#if defined(__AVX512F__)  // 0 <= f < 1; -inf has f = 0
  const __m512 whole = bitcast<__m512>(x);
  const Vec f = bitcast<Vec>(_mm512_maskz_reduce_ps(0xFFFF, whole, _MM_FROUND_TO_NEG_INF));
  const Vec power = polynomial(f, 2.161291532e-4f, 1.246784633e-3f, 9.675451582e-3f,
                               5.548528061e-2f, 2.402293056e-1f, 6.931470444e-1f);
  const __mmask16 normal = _mm512_cmp_ps_mask(whole, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return bitcast<Vec>(_mm512_maskz_scalef_ps(normal, bitcast<__m512>(power), whole));
#else  // |f| <= 1/2
  const float shift =
      12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number in the low bits
  const Vec lowest = splat(-126.0f);
  const Vec clamped = x < lowest ? lowest : x;
  const Vec shifted = clamped + shift;
  const Vec f = clamped - (shifted - shift);
  const Vec power = polynomial(f, 1.535336182e-4f, 1.339887445e-3f, 9.618437358e-3f,
                               5.550332471e-2f, 2.402264791e-1f, 6.931472029e-1f);
  const Vec scale = bitcast<Vec>((bitcast<Bits>(shifted) << 23) + (127u << 23));
  return x < lowest ? Vec{} : power * scale;
#endif
}

// From a and b, the halves of every 2 * step lanes: all the lower ones (a's, then b's), or all the
// upper ones.
inline Vec lower_halves(Vec a, Vec b, int step) {
  const Ints moved = (lanes() & step) != 0;
  return __builtin_shuffle(a, b, moved ? lanes() - step + kWidth : lanes());
}

inline Vec upper_halves(Vec a, Vec b, int step) {
  const Ints moved = (lanes() & step) != 0;
  return __builtin_shuffle(a, b, moved ? lanes() + kWidth : lanes() + step);
}

// Transposes a square of kWidth vectors in place: halves, quarters, ... change places.
inline void transpose(Vec* rows) {
#pragma GCC unroll 4
  for (int step = kWidth / 2; step > 0; step /= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) {
      if (i & step) continue;
      const Vec a = rows[i], b = rows[i + step];
      rows[i] = lower_halves(a, b, step);
      rows[i + step] = upper_halves(a, b, step);
    }
  }
}

// Lane i: the sum of rows[i]. The rows are used up.
inline Vec sums_of(Vec* rows) {
#pragma GCC unroll 4
  for (int step = kWidth / 2; step > 0; step /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < step; ++i) {
      const Vec a = rows[i], b = rows[i + step];
      rows[i] = lower_halves(a, b, step) + upper_halves(a, b, step);
    }
  }
  return rows[0];
}

}  // namespace
}  // namespace SPEEDER_ISA
}  // namespace speeder
