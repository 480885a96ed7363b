// How a family adds NumPy functions to _host without host.cpp knowing the families.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

namespace rk {

namespace py = pybind11;

// C-contiguous float32; other arrays are converted on the way in.
using FloatArray = py::array_t<float, py::array::c_style | py::array::forcecast>;
using BoolArray = py::array_t<bool, py::array::c_style | py::array::forcecast>;

inline std::vector<py::ssize_t> shape(const py::array& x) {
  return {x.shape(), x.shape() + x.ndim()};
}

inline std::vector<void (*)(py::module_&)>& bindings() {
  static std::vector<void (*)(py::module_&)> list;
  return list;
}

struct Binding {
  explicit Binding(void (*bind)(py::module_&)) { bindings().push_back(bind); }
};

inline void require(bool condition, const std::string& message) {
  if (!condition) throw py::value_error(message);
}

}  // namespace rk
