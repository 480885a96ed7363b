// swiglu on NumPy arrays.
#include "common/host.h"
#define RK_ROWS "swiglu/rows.h"
#include "common/foreach_isa.h"

namespace rk {
namespace {

FloatArray swiglu(const FloatArray& x, const FloatArray& gate) {
  require(x.size() == gate.size(), "swiglu: x and gate must have one size");
  FloatArray out(shape(x));
  RK_PICK(swiglu_row<float>)(x.data(), gate.data(), out.mutable_data(), x.size());
  return out;
}

py::tuple swiglu_backward(const FloatArray& grad, const FloatArray& x, const FloatArray& gate) {
  require(x.size() == gate.size() && x.size() == grad.size(),
          "swiglu_backward: grad, x and gate must have one size");
  FloatArray grad_x(shape(x)), grad_gate(shape(x));
  RK_PICK(swiglu_backward_row<float>)(grad.data(), x.data(), gate.data(), grad_x.mutable_data(),
                                      grad_gate.mutable_data(), x.size());
  return py::make_tuple(grad_x, grad_gate);
}

const Binding binding([](py::module_& m) {
  m.def("swiglu", &swiglu, py::arg("x"), py::arg("gate"), "silu(gate) * x, elementwise, float32.");
  m.def("swiglu_backward", &swiglu_backward, py::arg("grad"), py::arg("x"), py::arg("gate"),
        "Gradients of x and gate, float32.");
});

}  // namespace
}  // namespace rk
