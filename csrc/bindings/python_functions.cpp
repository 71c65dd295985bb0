// What Python calls by ctypes (speeder_kernels/_host.py): plain C functions, which need neither
// torch nor Python's headers.
#include <cstdint>
#include <exception>
#include <string>

#include "cpu/common/isa.h"
#include "cpu/plan_packing/plan_packing.h"

#define SPEEDER_FOR_PYTHON extern "C" __attribute__((visibility("default")))

// The names of isa.h. Null, with a text in `error`, where SPEEDER_CPU_ISA asks for what cannot be.
SPEEDER_FOR_PYTHON const char* speeder_instruction_set(const char** error) {
  try {
    return speeder::isa_name(speeder::instruction_set());
  } catch (const std::exception& exception) {
    thread_local std::string text;
    text = exception.what();
    *error = text.c_str();
    return nullptr;
  }
}

SPEEDER_FOR_PYTHON const char* speeder_best_instruction_set() {
  return speeder::isa_name(speeder::best_instruction_set());
}

// The bins of speeder::plan_packing, one behind the other in `order` (`count` indices): bin b is
// order[starts[b]] .. order[starts[b + 1] - 1], and `starts` has room for count + 1. Returns how
// many bins there are.
SPEEDER_FOR_PYTHON int64_t speeder_plan_packing(const int64_t* lengths, int64_t count,
                                                int64_t max_tokens, int64_t* order,
                                                int64_t* starts) {
  const auto bins = speeder::plan_packing(lengths, count, max_tokens);
  int64_t at = 0;
  for (size_t b = 0; b < bins.size(); ++b) {
    starts[b] = at;
    for (const int64_t index : bins[b]) order[at++] = index;
  }
  starts[bins.size()] = at;
  return static_cast<int64_t>(bins.size());
}
