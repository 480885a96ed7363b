// vtrace on the CPU: schema, memory-safety checks, groups of rows in parallel.
#include "advantage/optimize.h"
#include "advantage/planes.h"
#define RK_ROWS "advantage/vtrace_rows.h"
#include "common/foreach_isa.h"

namespace rk {
namespace {

std::tuple<Tensor, Tensor> vtrace(const Tensor& log_ratio, const Tensor& rewards, const Tensor& values,
                                  const std::optional<Tensor>& mask, const std::optional<Tensor>& done,
                                  const std::optional<Tensor>& next_value, double gamma, double lam,
                                  double rho_clip, double c_clip, int64_t grain) {
  Planes planes(values, "vtrace");
  Tensor targets = planes.empty(), advantages = planes.empty();
  dispatch_float(planes.dtype(), "vtrace", [&](auto zero) {
    using T = decltype(zero);
    const GaeFlags flags = planes.flags(mask, done, std::nullopt, true);
    const VTrace<T> g{planes.matrix<T>(log_ratio),
                      planes.matrix<T>(rewards),
                      planes.matrix<T>(values),
                      next_value ? planes.column<T>(*next_value) : Plane<const T>{},
                      flags.mask,
                      flags.done,
                      written<T>(targets),
                      written<T>(advantages),
                      planes.rows(),
                      planes.steps(),
                      gamma,
                      lam,
                      rho_clip,
                      c_clip};
    const auto kernel = RK_PICK(vtrace_rows<T>);
    each_group(g.rows, g.steps, grain, [&](int64_t begin, int64_t end) { kernel(g, begin, end); });
  });
  return {targets, advantages};
}

}  // namespace
}  // namespace rk

STABLE_TORCH_LIBRARY_FRAGMENT(rlhf_kernels_native, m) {
  m.def(
      "vtrace(Tensor log_ratio, Tensor rewards, Tensor values, Tensor? mask, Tensor? done, Tensor? "
      "next_value,"
      " float gamma, float lam, float rho_clip, float c_clip, int grain=32768) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels_native, CPU, m) {
  m.impl("vtrace", TORCH_BOX(&rk::vtrace));
}
