// linear_recurrence on NumPy arrays.
#include "advantage/optimize.h"
#include "advantage/args.h"
#include "common/host.h"
#define RK_ROWS "advantage/recurrence_rows.h"
#include "common/foreach_isa.h"

namespace rk {
namespace {

FloatArray linear_recurrence(const FloatArray& a, const FloatArray& b, const py::object& given,
                             bool reverse) {
  require(b.ndim() == 2 && a.ndim() == 2 && shape(a) == shape(b),
          "linear_recurrence: a and b must be [batch, time], of one shape");
  const int64_t rows = b.shape(0), steps = b.shape(1);
  FloatArray initial, y(shape(b));
  Recurrence<float> g{{a.data(), steps}, {b.data(), steps}, {}, {y.mutable_data(), steps}, rows, steps};
  if (!given.is_none()) {
    initial = given.cast<FloatArray>();
    require(initial.ndim() == 1 && initial.shape(0) == rows, "linear_recurrence: initial must be [batch]");
    g.initial = {initial.data(), 1};
  }
  const auto kernel =
      reverse ? RK_PICK(recurrence_rows<float, true>) : RK_PICK(recurrence_rows<float, false>);
  kernel(g, 0, rows);
  return y;
}

const Binding binding([](py::module_& m) {
  m.def("linear_recurrence", &linear_recurrence, py::arg("a"), py::arg("b"), py::arg("initial") = py::none(),
        py::arg("reverse") = true,
        "y_t = a_t y_(t+1) + b_t (with y_(t-1) where not reverse), [batch, time], float32.");
});

}  // namespace
}  // namespace rk
