// linear_recurrence on the CPU: schema, memory-safety checks, groups of rows in parallel.
#include "advantage/optimize.h"
#include "advantage/planes.h"
#define RK_ROWS "advantage/recurrence_rows.h"
#include "common/foreach_isa.h"

namespace rk {
namespace {

Tensor linear_recurrence(const Tensor& a, const Tensor& b, const std::optional<Tensor>& initial, bool reverse,
                         int64_t grain) {
  Planes planes(b, "linear_recurrence");
  Tensor out = planes.empty();
  dispatch_float(b.scalar_type(), "linear_recurrence", [&](auto zero) {
    using T = decltype(zero);
    const Recurrence<T> g{planes.matrix<T>(a),
                          planes.matrix<T>(b),
                          initial ? planes.column<T>(*initial) : Plane<const T>{},
                          {static_cast<T*>(out.data_ptr()), planes.steps()},
                          planes.rows(),
                          planes.steps()};
    const auto kernel = reverse ? RK_PICK(recurrence_rows<T, true>) : RK_PICK(recurrence_rows<T, false>);
    each_group(g.rows, g.steps, grain, [&](int64_t begin, int64_t end) { kernel(g, begin, end); });
  });
  return out;
}

}  // namespace
}  // namespace rk

STABLE_TORCH_LIBRARY_FRAGMENT(rlhf_kernels_native, m) {
  m.def("linear_recurrence(Tensor a, Tensor b, Tensor? initial, bool reverse, int grain=32768) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels_native, CPU, m) {
  m.impl("linear_recurrence", TORCH_BOX(&rk::linear_recurrence));
}
