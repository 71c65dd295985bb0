// The primitives of device.h on a GPU, sm_80 and later.
#pragma once

namespace speeder {
namespace cuda {

SPEEDER_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
SPEEDER_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }
SPEEDER_DEVICE int block_index_x() { return static_cast<int>(blockIdx.x); }
SPEEDER_DEVICE int block_index_y() { return static_cast<int>(blockIdx.y); }
SPEEDER_DEVICE int block_index_z() { return static_cast<int>(blockIdx.z); }
SPEEDER_DEVICE int grid_blocks_x() { return static_cast<int>(gridDim.x); }
SPEEDER_DEVICE int grid_blocks_y() { return static_cast<int>(gridDim.y); }
SPEEDER_DEVICE int grid_blocks_z() { return static_cast<int>(gridDim.z); }

SPEEDER_DEVICE void sync_block() { __syncthreads(); }
SPEEDER_DEVICE void sync_warp() { __syncwarp(); }

template <typename T>
SPEEDER_DEVICE T shuffle(T value, int source) {
  static_assert(sizeof(T) == 4, "a shuffle moves four bytes");
  return __shfl_sync(0xFFFFFFFFu, value, source);
}

template <typename T>
SPEEDER_DEVICE T shuffle_xor(T value, int mask) {
  static_assert(sizeof(T) == 4, "a shuffle moves four bytes");
  return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}

SPEEDER_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char speeder_shared_memory[];
  return speeder_shared_memory;
}

// Accesses of 16 bytes are written out: one to a struct of eight elements the compiler may split.
template <typename V>
SPEEDER_DEVICE V read_global(const V* from) {
  if constexpr (sizeof(V) == 16) {
    const uint4 raw = __ldg(reinterpret_cast<const uint4*>(from));
    V value;
    memcpy(&value, &raw, sizeof(V));
    return value;
  } else {
    return *from;
  }
}

template <typename V>
SPEEDER_DEVICE void write_global(V* to, const V& value) {
  if constexpr (sizeof(V) == 16) {
    uint32_t raw[4];
    memcpy(raw, &value, sizeof(V));
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};\n" ::"l"(__cvta_generic_to_global(to)),
                 "r"(raw[0]), "r"(raw[1]), "r"(raw[2]), "r"(raw[3])
                 : "memory");
  } else {
    *to = value;
  }
}

template <typename V>
SPEEDER_DEVICE V read_shared(SharedRange range, int byte) {
  return *reinterpret_cast<const V*>(shared_memory() + range.start + byte);
}

template <typename V>
SPEEDER_DEVICE void write_shared(SharedRange range, int byte, const V& value) {
  *reinterpret_cast<V*>(shared_memory() + range.start + byte) = value;
}

SPEEDER_DEVICE uint32_t shared_address(SharedRange range, int byte) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory() + range.start + byte));
}

// .cg: past the first cache too, for what a block reads is read once.
SPEEDER_DEVICE void copy_shared_async16(SharedRange to, int byte, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to, byte)),
               "l"(__cvta_generic_to_global(from)), "r"(valid ? 16 : 0)
               : "memory");
}

// .ca: the instruction has no .cg for less than 16 bytes.
SPEEDER_DEVICE void copy_shared_async4(SharedRange to, int byte, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(shared_address(to, byte)),
               "l"(__cvta_generic_to_global(from)), "r"(valid ? 4 : 0)
               : "memory");
}

SPEEDER_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

template <int N>
SPEEDER_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}

// kCount (2 or 4) matrices of 8 x 8 two-byte elements. Lane 8 m + r gives the place of row r of
// matrix m; lane l gets elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of each, or of its
// transpose.
template <int kCount, bool kTransposed>
SPEEDER_DEVICE void load_matrices(uint32_t (&out)[kCount], SharedRange range, int byte) {
  static_assert(kCount == 2 || kCount == 4, "ldmatrix takes 2 or 4 matrices here");
  const uint32_t address = shared_address(range, byte);
  if constexpr (kCount == 4 && kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kCount == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];\n"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];\n"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(address)
                 : "memory");
  }
}

// c += a b for a tile of 16 x 8 x 16; the fragments are those of tile_product.h.
template <typename T>
SPEEDER_DEVICE void multiply_fragments(float (&c)[4], const uint32_t (&a)[4],
                                       const uint32_t (&b)[2]);

template <>
SPEEDER_DEVICE void multiply_fragments<BFloat16>(float (&c)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
SPEEDER_DEVICE void multiply_fragments<Half>(float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

SPEEDER_DEVICE float exp2_fast(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(out) : "f"(x));
  return out;
}

// The first operand of cvt is the upper half.
template <typename T>
SPEEDER_DEVICE uint32_t round_pair(float low, float high);

template <>
SPEEDER_DEVICE uint32_t round_pair<BFloat16>(float low, float high) {
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

template <>
SPEEDER_DEVICE uint32_t round_pair<Half>(float low, float high) {
  uint32_t out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

SPEEDER_DEVICE void atomic_add(float* to, float value) { atomicAdd(to, value); }

}  // namespace cuda
}  // namespace speeder
