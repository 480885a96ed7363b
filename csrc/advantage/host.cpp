// gae on NumPy arrays.
#include "advantage/optimize.h"
#include "advantage/args.h"
#include "common/host.h"
#define RK_ROWS "advantage/rows.h"
#include "common/foreach_isa.h"

namespace rk {
namespace {

bool fits(const py::array& x, int64_t rows, int64_t steps) {
  return x.ndim() == 2 && x.shape(0) == rows && x.shape(1) == steps;
}

// None, or the mask, which must be kept alive while its bytes are read.
BoolArray mask_of(const py::object& given, int64_t rows, int64_t steps) {
  if (given.is_none()) return BoolArray();
  BoolArray mask = given.cast<BoolArray>();
  require(fits(mask, rows, steps), "gae: mask must have the shape of rewards");
  return mask;
}

GaeFlags flags_of(const py::object& given, const BoolArray& mask, int64_t steps) {
  GaeFlags flags{};
  flags.carry = true;
  if (!given.is_none()) flags.mask = {reinterpret_cast<const uint8_t*>(mask.data()), steps};
  return flags;
}

py::tuple gae(const FloatArray& rewards, const FloatArray& values, const py::object& given_mask, double gamma,
              double lam) {
  require(rewards.ndim() == 2, "gae: rewards must be [batch, time]");
  const int64_t rows = rewards.shape(0), steps = rewards.shape(1);
  require(fits(values, rows, steps), "gae: values must have the shape of rewards");
  const BoolArray mask = mask_of(given_mask, rows, steps);
  FloatArray advantages({rows, steps}), returns({rows, steps});
  GaeForward<float> g{};
  g.rewards = {rewards.data(), steps};
  g.values = {values.data(), steps};
  g.flags = flags_of(given_mask, mask, steps);
  g.advantages = {advantages.mutable_data(), steps};
  g.returns = {returns.mutable_data(), steps};
  g.rows = rows;
  g.steps = steps;
  g.gamma = gamma;
  g.lam = lam;
  const auto kernel =
      g.flags.mask ? RK_PICK(gae_rows<float, GaeKind::kMasked>) : RK_PICK(gae_rows<float, GaeKind::kPlain>);
  kernel(g, 0, rows);
  return py::make_tuple(advantages, returns);
}

py::tuple gae_backward(const FloatArray& grad_advantages, const FloatArray& grad_returns,
                       const py::object& given_mask, double gamma, double lam) {
  require(grad_advantages.ndim() == 2, "gae_backward: the gradients must be [batch, time]");
  const int64_t rows = grad_advantages.shape(0), steps = grad_advantages.shape(1);
  require(fits(grad_returns, rows, steps), "gae_backward: the gradients must have one shape");
  const BoolArray mask = mask_of(given_mask, rows, steps);
  FloatArray grad_rewards({rows, steps}), grad_values({rows, steps});
  GaeBackward<float> g{};
  g.grad_advantages = {grad_advantages.data(), steps};
  g.grad_returns = {grad_returns.data(), steps};
  g.flags = flags_of(given_mask, mask, steps);
  g.grad_rewards = {grad_rewards.mutable_data(), steps};
  g.grad_values = {grad_values.mutable_data(), steps};
  g.rows = rows;
  g.steps = steps;
  g.gamma = gamma;
  g.lam = lam;
  const auto kernel = g.flags.mask ? RK_PICK(gae_backward_rows<float, GaeKind::kMasked>)
                                   : RK_PICK(gae_backward_rows<float, GaeKind::kPlain>);
  kernel(g, 0, rows);
  return py::make_tuple(grad_rewards, grad_values);
}

const Binding binding([](py::module_& m) {
  m.def("gae", &gae, py::arg("rewards"), py::arg("values"), py::arg("mask") = py::none(),
        py::arg("gamma") = 1.0, py::arg("lam") = 0.95,
        "Advantages and returns [batch, time], float32; the state passes over steps whose mask is False.");
  m.def("gae_backward", &gae_backward, py::arg("grad_advantages"), py::arg("grad_returns"),
        py::arg("mask") = py::none(), py::arg("gamma") = 1.0, py::arg("lam") = 0.95,
        "Gradients of rewards and values [batch, time], float32.");
});

}  // namespace
}  // namespace rk
