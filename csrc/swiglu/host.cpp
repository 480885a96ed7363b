// swiglu on NumPy arrays.
#include "common/host.h"
#define RK_ROWS "swiglu/rows.h"
#include "common/foreach_isa.h"

namespace rk {
namespace {

FloatArray swiglu(const FloatArray& x, const FloatArray& gate) {
  require(x.size() == gate.size(), "swiglu: x and gate must have one size");
  FloatArray out(std::vector<py::ssize_t>(x.shape(), x.shape() + x.ndim()));
  RK_PICK(swiglu_row<float>)(x.data(), gate.data(), out.mutable_data(), x.size());
  return out;
}

const Binding binding([](py::module_& m) {
  m.def("swiglu", &swiglu, py::arg("x"), py::arg("gate"), "silu(gate) * x, elementwise, float32.");
});

}  // namespace
}  // namespace rk
