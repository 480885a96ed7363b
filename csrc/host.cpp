// The row kernels on NumPy arrays, without torch: for NumPy users, sanitizers, fuzzing, instruction counts.
// Each family adds its functions from <family>/host.cpp through a Binding.
#include "common/host.h"

#include "common/isa.h"

PYBIND11_MODULE(_host, m) {
  m.doc() = "Torch-free row kernels of rlhf_kernels on NumPy arrays.";
  m.def("isa", [] { return rk::isa_name(); }, "Instruction-set level in use: base, v3 (AVX2) or v4 (AVX-512).");
  m.def("compiler", [] { return std::string(__VERSION__); }, "Version of the compiler that built this module.");
  for (auto bind : rk::bindings()) bind(m);
}
