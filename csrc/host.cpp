// The row kernels on NumPy arrays, without torch: for NumPy users, sanitizers, fuzzing, instruction counts.
// Each family adds its functions from <family>/host.cpp through a Binding.
#include "common/host.h"

#include "common/isa.h"

// Instruction counting collects inside this frame alone: it must keep its name and never be inlined.
extern "C" __attribute__((noinline, visibility("default"))) void rk_counted(PyObject* call) {
  Py_XDECREF(PyObject_CallNoArgs(call));
}

PYBIND11_MODULE(_host, m) {
  m.doc() = "Torch-free row kernels of rlhf_kernels on NumPy arrays.";
  m.def(
      "isa", [] { return rk::isa_name(); }, "Instruction-set level in use: base, v3 (AVX2) or v4 (AVX-512).");
  m.def(
      "compiler", [] { return std::string(__VERSION__); }, "Version of the compiler that built this module.");
  m.def(
      "counted",
      [](const rk::py::object& call) {
        rk_counted(call.ptr());
        if (PyErr_Occurred()) throw rk::py::error_already_set();
      },
      rk::py::arg("call"), "Calls `call()` in a frame that an instruction counter can find (rk_counted).");
  for (auto bind : rk::bindings()) bind(m);
}
