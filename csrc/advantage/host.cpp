// gae on NumPy arrays.
#include "advantage/args.h"
#include "common/host.h"
#define RK_ROWS "advantage/rows.h"
#include "common/foreach_isa.h"

namespace rk {
namespace {

py::tuple gae(const FloatArray& rewards, const FloatArray& values, const py::object& given_mask, double gamma,
              double lam) {
  require(rewards.ndim() == 2, "gae: rewards must be [batch, time]");
  const int64_t rows = rewards.shape(0), steps = rewards.shape(1);
  const bool masked = !given_mask.is_none();
  const BoolArray mask = masked ? given_mask.cast<BoolArray>() : BoolArray();
  const auto fits = [&](const py::array& x) {
    return x.ndim() == 2 && x.shape(0) == rows && x.shape(1) == steps;
  };
  require(fits(values) && (!masked || fits(mask)), "gae: values and mask must have the shape of rewards");
  FloatArray advantages({rows, steps}), returns({rows, steps});
  GaeForward<float> g{};
  g.rewards = {rewards.data(), steps};
  g.values = {values.data(), steps};
  g.flags.carry = true;
  if (masked) g.flags.mask = {reinterpret_cast<const uint8_t*>(mask.data()), steps};
  g.advantages = {advantages.mutable_data(), steps};
  g.returns = {returns.mutable_data(), steps};
  g.rows = rows;
  g.steps = steps;
  g.gamma = gamma;
  g.lam = lam;
  const auto kernel =
      masked ? RK_PICK(gae_rows<float, GaeKind::kMasked>) : RK_PICK(gae_rows<float, GaeKind::kPlain>);
  kernel(g, 0, rows);
  return py::make_tuple(advantages, returns);
}

const Binding binding([](py::module_& m) {
  m.def("gae", &gae, py::arg("rewards"), py::arg("values"), py::arg("mask") = py::none(),
        py::arg("gamma") = 1.0, py::arg("lam") = 0.95,
        "Advantages and returns [batch, time], float32; the state passes over steps whose mask is False.");
});

}  // namespace
}  // namespace rk
