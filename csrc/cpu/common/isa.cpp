// Asks the processor (and the environment) which instruction set to use.
#include "cpu/common/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace speeder {
namespace {

// Whether there is AMX with bfloat16, and Linux grants it: a process asks once, for all its threads
// and the children that it forks. (Compilers' __builtin_cpu_supports knows the processor only.)
bool amx_granted() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kBFloat16 = 1u << 22, kTile = 1u << 24;  // of leaf 7's EDX
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(2)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if ((d & kBFloat16) == 0 || (d & kTile) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// The last that needs no grant.
Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::kAvx512Bf16;
  if (avx512) return Isa::kAvx512;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kPortable;
}

// Intel's processors do bfloat16 dot products of vectors at half the rate of float32's (measured:
// 56 to 120 GFLOP/s a core on a fifth-generation Xeon), AMD's at twice that rate.
Isa fastest(Isa best) {
#if defined(__x86_64__)
  if (best == Isa::kAvx512Bf16 && __builtin_cpu_is("intel")) return Isa::kAvx512;
#endif
  return best;
}

Isa choose() {
  const char* wanted = std::getenv("SPEEDER_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return fastest(best_instruction_set());
  for (int isa = 0; isa <= static_cast<int>(Isa::kAvx512Amx); ++isa) {
    if (std::string(wanted) != isa_name(static_cast<Isa>(isa))) continue;
    if (isa <= static_cast<int>(detect())) return static_cast<Isa>(isa);  // AMX is not asked for
    const Isa best = best_instruction_set();
    if (isa <= static_cast<int>(best)) return static_cast<Isa>(isa);
    throw std::invalid_argument("SPEEDER_CPU_ISA: expected at most " + std::string(isa_name(best)) +
                                ", the best that this processor has and the system allows, got " +
                                wanted);
  }
  throw std::invalid_argument(
      "SPEEDER_CPU_ISA: expected portable, avx2, avx512, avx512_bf16 or avx512_amx, got " +
      std::string(wanted));
}

}  // namespace

Isa best_instruction_set() {
  static const Isa isa = [] {
    const Isa best = detect();
    return best == Isa::kAvx512Bf16 && amx_granted() ? Isa::kAvx512Amx : best;
  }();
  return isa;
}

Isa instruction_set() {
  static const Isa isa = choose();
  return isa;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return "portable";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kAvx512Amx:
      return "avx512_amx";
  }
  return "unknown";
}

}  // namespace speeder
