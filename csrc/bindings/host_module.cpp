// The Python module speeder_kernels._host: what was built, the instruction set in use, and the
// sequence-packing planner. build_info.h is written by setup.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "build_info.h"
#include "cpu/common/isa.h"
#include "cpu/plan_packing/plan_packing.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["compiler"] = SPEEDER_COMPILER;
  info["torch"] = SPEEDER_TORCH;
  info["cuda"] = SPEEDER_CUDA_VERSION;
  info["cuda_missing"] = SPEEDER_CUDA_MISSING;
  info["cuda_archs"] = SPEEDER_CUDA_ARCHS;
  return info;
}

std::vector<std::vector<int64_t>> plan_packing(
    const py::array_t<int64_t, py::array::c_style | py::array::forcecast>& lengths,
    int64_t max_tokens) {
  const int64_t* data = lengths.data();
  const int64_t count = lengths.size();
  const py::gil_scoped_release release;
  return speeder::plan_packing(data, count, max_tokens);
}

}  // namespace

PYBIND11_MODULE(_host, module) {
  module.doc() = "Build information, instruction set and sequence packing of speeder_kernels.";
  module.def("build_info", &build_info,
             "Compiler, torch and CUDA that the kernels were built with, and why not with CUDA.");
  module.def(
      "instruction_set", [] { return speeder::isa_name(speeder::instruction_set()); },
      "The instruction set that the CPU kernels use: portable, avx2, avx512, avx512_bf16 or "
      "avx512_amx.");
  module.def(
      "best_instruction_set", [] { return speeder::isa_name(speeder::best_instruction_set()); },
      "The last of them that can be used here, which need not be the fastest.");
  module.def("plan_packing", &plan_packing, py::arg("lengths"), py::arg("max_tokens"),
             "First-fit decreasing; see speeder_kernels.plan_packing, which checks arguments.");
}
