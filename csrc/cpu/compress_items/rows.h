// What passes between compress_items.cpp, which shares the items out, and the loops that are built
// once for each instruction set.
#pragma once

#include <cstdint>

#include "cpu/compress_items/compress_items.h"

namespace speeder {

struct CompressKernels {
  // Items begin .. end - 1. `scratch` holds compress_scratch_floats() floats.
  void (*forward)(const CompressForward& call, int64_t begin, int64_t end, float* scratch);
  // The same; grad_weight (size rounded up to whole vectors, or null) is added to.
  void (*backward)(const CompressBackward& call, int64_t begin, int64_t end, float* grad_weight,
                   float* scratch);
};

namespace portable {
extern const CompressKernels kCompress[3];  // indexed by DType
}
namespace avx2 {
extern const CompressKernels kCompress[3];
}
namespace avx512 {
extern const CompressKernels kCompress[3];
}

namespace {

constexpr int64_t kCompressUnit = 16;  // floats in the widest vector
inline int64_t compress_padded(int64_t n) {
  return (n + kCompressUnit - 1) / kCompressUnit * kCompressUnit;
}
// Two vectors of an item's size, three of its modalities.
inline int64_t compress_scratch_floats(const CompressArgs& args) {
  return 2 * compress_padded(args.size) + 3 * compress_padded(args.modalities);
}

}  // namespace
}  // namespace speeder
