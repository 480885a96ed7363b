// rotary on NumPy arrays.
#include "common/host.h"
#define RK_ROWS "rotary/rows.h"
#include "common/foreach_isa.h"

namespace rk {
namespace {

FloatArray rotary(const FloatArray& x, const FloatArray& cos, const FloatArray& sin, bool interleaved) {
  require(x.ndim() >= 2 && x.shape(x.ndim() - 1) % 2 == 0, "rotary: x must be [..., T, D] with an even D");
  const int64_t steps = x.shape(x.ndim() - 2), width = x.shape(x.ndim() - 1);
  for (const FloatArray* table : {&cos, &sin})
    require(table->ndim() == 2 && table->shape(0) == steps && table->shape(1) == width / 2,
            "rotary: cos and sin must be [T, D/2]");
  FloatArray out(shape(x));
  const auto rotate = interleaved ? RK_PICK(rotate_rows<float, true>) : RK_PICK(rotate_rows<float, false>);
  for (int64_t at = 0; at < x.size(); at += steps * width)
    rotate(x.data() + at, width, cos.data(), sin.data(), out.mutable_data() + at, steps, width / 2, 1.0f);
  return out;
}

const Binding binding([](py::module_& m) {
  m.def("rotary", &rotary, py::arg("x"), py::arg("cos"), py::arg("sin"), py::arg("interleaved") = false,
        "Rotates x [..., T, D] by tables [T, D/2], float32.");
});

}  // namespace
}  // namespace rk
