// The Python module speeder_kernels._native: the instruction set in use, and the sequence-packing
// planner. Python's side of it is speeder_kernels/_host.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/common/isa.h"
#include "cpu/plan_packing/plan_packing.h"

namespace py = pybind11;

namespace {

std::vector<std::vector<int64_t>> plan_packing(
    const py::array_t<int64_t, py::array::c_style | py::array::forcecast>& lengths,
    int64_t max_tokens) {
  const int64_t* data = lengths.data();
  const int64_t count = lengths.size();
  const py::gil_scoped_release release;
  return speeder::plan_packing(data, count, max_tokens);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Instruction set and sequence packing of speeder_kernels.";
  module.def("instruction_set", [] { return speeder::isa_name(speeder::instruction_set()); });
  module.def("best_instruction_set",
             [] { return speeder::isa_name(speeder::best_instruction_set()); });
  module.def("plan_packing", &plan_packing, py::arg("lengths"), py::arg("max_tokens"));
}
