// Which instruction set the CPU kernels use, asked of the processor once, when first needed.
#pragma once

namespace speeder {

enum class Isa { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAvx512Amx = 4 };

// The fastest one that this processor has and the system allows, or the one named by the
// environment variable SPEEDER_CPU_ISA. Throws std::invalid_argument for a name that is unknown or
// that cannot be used here.
Isa instruction_set();

// The last of the above that can be used here, which need not be the fastest. Asks the system for
// AMX, for as long as the process lives.
Isa best_instruction_set();

// "portable", "avx2", "avx512", "avx512_bf16" or "avx512_amx".
const char* isa_name(Isa isa);

}  // namespace speeder
