// token_advantages on NumPy arrays, before whitening.
#include "advantage/optimize.h"
#include "advantage/args.h"
#include "common/host.h"
#include "normalize/moments.h"
#define RK_ROWS "advantage/token_rows.h"
#include "common/foreach_isa.h"

namespace rk {
namespace {

Plane<const uint8_t> bytes(const BoolArray& mask) {
  return {reinterpret_cast<const uint8_t*>(mask.data()), mask.shape(1)};
}

bool fits(const py::array& x, int64_t rows, int64_t steps) {
  return x.ndim() == 2 && x.shape(0) == rows && x.shape(1) == steps;
}

py::tuple token_advantages(const FloatArray& score, const FloatArray& kl, const FloatArray& values,
                           const BoolArray& mask, double kl_coef, double gamma, double lam, bool carry) {
  require(values.ndim() == 2, "token_advantages: values must be [batch, time]");
  const int64_t rows = values.shape(0), steps = values.shape(1);
  require(fits(kl, rows, steps), "token_advantages: kl must have the shape of values");
  require(fits(mask, rows, steps), "token_advantages: mask must have the shape of values");
  require(score.ndim() == 1 && score.shape(0) == rows, "token_advantages: score must be [batch]");
  FloatArray advantages({rows, steps}), returns({rows, steps});
  const TokenForward<float> g{{score.data(), 1},
                              {kl.data(), steps},
                              {values.data(), steps},
                              bytes(mask),
                              {advantages.mutable_data(), steps},
                              {returns.mutable_data(), steps},
                              rows,
                              steps,
                              kl_coef,
                              gamma,
                              lam};
  const auto kernel =
      carry ? RK_PICK(token_rows<float, float, true>) : RK_PICK(token_rows<float, float, false>);
  kernel(g, 0, rows);
  return py::make_tuple(advantages, returns);
}

py::tuple token_advantages_backward(const FloatArray& grad_advantages, const FloatArray& grad_returns,
                                    const BoolArray& mask, double kl_coef, double gamma, double lam,
                                    bool carry) {
  require(grad_advantages.ndim() == 2, "token_advantages_backward: the gradients must be [batch, time]");
  const int64_t rows = grad_advantages.shape(0), steps = grad_advantages.shape(1);
  require(fits(grad_returns, rows, steps), "token_advantages_backward: the gradients must have one shape");
  require(fits(mask, rows, steps), "token_advantages_backward: mask must have the shape of the gradients");
  FloatArray grad_score(std::vector<py::ssize_t>{rows}), grad_kl({rows, steps}), grad_values({rows, steps});
  for (int64_t r = 0; steps == 0 && r < rows; ++r) grad_score.mutable_data()[r] = 0;
  const TokenBackward<float> g{{grad_advantages.data(), steps},
                               {grad_returns.data(), steps},
                               {},
                               bytes(mask),
                               {grad_score.mutable_data(), 1},
                               {grad_kl.mutable_data(), steps},
                               {grad_values.mutable_data(), steps},
                               rows,
                               steps,
                               kl_coef,
                               gamma,
                               lam};
  const BackwardMap<float> unused(Moments{}, GradientSums{}, NormalizeOptions::of(1, 0));
  const auto kernel = carry ? RK_PICK(token_backward_rows<float, true, false>)
                            : RK_PICK(token_backward_rows<float, false, false>);
  kernel(g, unused, 0, rows);
  return py::make_tuple(grad_score, grad_kl, grad_values);
}

const Binding binding([](py::module_& m) {
  m.def("token_advantages", &token_advantages, py::arg("score"), py::arg("kl"), py::arg("values"),
        py::arg("mask"), py::arg("kl_coef"), py::arg("gamma") = 1.0, py::arg("lam") = 0.95,
        py::arg("carry") = true,
        "Advantages before whitening, and returns [batch, time], float32; 0 where the mask is False.");
  m.def("token_advantages_backward", &token_advantages_backward, py::arg("grad_advantages"),
        py::arg("grad_returns"), py::arg("mask"), py::arg("kl_coef"), py::arg("gamma") = 1.0,
        py::arg("lam") = 0.95, py::arg("carry") = true,
        "Gradients of the scores [batch], of the KL terms and of the values [batch, time], float32.");
});

}  // namespace
}  // namespace rk
