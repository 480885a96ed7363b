// vtrace on NumPy arrays.
#include "advantage/optimize.h"
#include "advantage/args.h"
#include "common/host.h"
#define RK_ROWS "advantage/vtrace_rows.h"
#include "common/foreach_isa.h"

namespace rk {
namespace {

py::tuple vtrace(const FloatArray& log_ratio, const FloatArray& rewards, const FloatArray& values,
                 const py::object& given_mask, double gamma, double lam, double rho_clip, double c_clip) {
  require(values.ndim() == 2 && shape(log_ratio) == shape(values) && shape(rewards) == shape(values),
          "vtrace: log_ratio, rewards and values must be [batch, time], of one shape");
  const int64_t rows = values.shape(0), steps = values.shape(1);
  FloatArray targets(shape(values)), advantages(shape(values));
  BoolArray mask;
  VTrace<float> g{{log_ratio.data(), steps}, {rewards.data(), steps}, {values.data(), steps}};
  if (!given_mask.is_none()) {
    mask = given_mask.cast<BoolArray>();
    require(shape(mask) == shape(values), "vtrace: the mask must have the shape of values");
    g.mask = {reinterpret_cast<const uint8_t*>(mask.data()), steps};
  }
  g.targets = {targets.mutable_data(), steps};
  g.advantages = {advantages.mutable_data(), steps};
  g.rows = rows;
  g.steps = steps;
  g.gamma = gamma;
  g.lam = lam;
  g.rho_clip = rho_clip;
  g.c_clip = c_clip;
  RK_PICK(vtrace_rows<float>)(g, 0, rows);
  return py::make_tuple(targets, advantages);
}

const Binding binding([](py::module_& m) {
  m.def("vtrace", &vtrace, py::arg("log_ratio"), py::arg("rewards"), py::arg("values"),
        py::arg("mask") = py::none(), py::arg("gamma") = 1.0, py::arg("lam") = 1.0, py::arg("rho_clip") = 1.0,
        py::arg("c_clip") = 1.0, "Targets and advantages of V-trace, [batch, time], float32.");
});

}  // namespace
}  // namespace rk
