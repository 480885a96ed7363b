// layer_norm and rms_norm on NumPy arrays.
#include "common/host.h"
#include "norm/args.h"
#define RK_ROWS "norm/rows.h"
#include "common/foreach_isa.h"

namespace rk {
namespace {

FloatArray zeros(py::ssize_t n) {
  FloatArray all(n);
  for (py::ssize_t i = 0; i < n; ++i) all.mutable_at(i) = 0;
  return all;
}

// Rows of x + residual by weight and bias; an absent one is an empty array.
py::tuple norm(const FloatArray& x, const FloatArray& weight, const FloatArray& bias,
               const FloatArray& residual, double eps, bool center) {
  require(x.ndim() == 2 && weight.size() == x.shape(1), "norm: x must be [rows, n] and weight [n]");
  require(bias.size() == 0 || bias.size() == x.shape(1), "norm: bias must be [n] or empty");
  require(residual.size() == 0 || residual.size() == x.size(), "norm: residual must be as x or empty");
  FloatArray out(shape(x)), summed(shape(residual)), statistics(x.shape(0) * kNormStatistics);
  const int64_t n = x.shape(1);
  NormForward<float> g{};
  g.x = {x.data(), n};
  if (residual.size()) g.residual = {residual.data(), n};
  g.weight = weight.data();
  g.bias = bias.size() ? bias.data() : nullptr;
  g.summed = {summed.mutable_data(), n};
  g.out = {out.mutable_data(), n};
  g.statistics = statistics.mutable_data();
  g.cols = n;
  g.eps = eps;
  g.center = center;
  RK_PICK(norm_forward_rows<float>)(g, 0, n ? x.shape(0) : 0);
  return py::make_tuple(out, summed);
}

py::tuple norm_backward(const FloatArray& grad, const FloatArray& grad_summed, const FloatArray& x,
                        const FloatArray& weight, const FloatArray& statistics, double eps, bool center) {
  require(x.ndim() == 2 && weight.size() == x.shape(1), "norm_backward: x must be [rows, n] and weight [n]");
  require(grad.size() == x.size(), "norm_backward: grad must be as x");
  require(grad_summed.size() == 0 || grad_summed.size() == x.size(),
          "norm_backward: grad_summed must be as x or empty");
  require(statistics.size() == x.shape(0) * kNormStatistics, "norm_backward: statistics must be [rows, 3]");
  const int64_t n = x.shape(1);
  NormBackward<float> g{};
  g.statistics = statistics.data();
  g.x = {x.data(), n};
  g.grad = {grad.data(), n};
  if (grad_summed.size()) g.grad_summed = {grad_summed.data(), n};
  g.weight = weight.data();
  g.rows = n ? x.shape(0) : 0;
  g.cols = n;
  g.eps = eps;
  g.center = center;
  FloatArray grad_x(shape(x)), sums = zeros(2 * g.groups() * n), grad_weight(n), grad_bias(n);
  g.grad_x = {grad_x.mutable_data(), n};
  g.weight_sums = sums.mutable_data();
  g.bias_sums = g.weight_sums + g.groups() * n;
  RK_PICK(norm_backward_groups<float>)(g, 0, g.groups());
  const auto combine = RK_PICK(norm_combine<float>);
  combine(g.weight_sums, g.groups(), n, grad_weight.mutable_data(), 0, n);
  combine(g.bias_sums, g.groups(), n, grad_bias.mutable_data(), 0, n);
  return py::make_tuple(grad_x, grad_weight, grad_bias);
}

const Binding binding([](py::module_& m) {
  m.def("norm", &norm, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("residual"),
        py::arg("eps") = 1e-5, py::arg("center") = true,
        "Rows of x + residual [rows, n] at mean 0 (or, not centred, as they are) and mean square 1, times"
        " weight, plus bias; and the sums. Float32; an empty bias or residual is none.");
  m.def("norm_backward", &norm_backward, py::arg("grad"), py::arg("grad_summed"), py::arg("x"),
        py::arg("weight"), py::arg("statistics"), py::arg("eps") = 1e-5, py::arg("center") = true,
        "Gradients of x, weight and bias, float32; an empty grad_summed is none. `statistics` [rows, 3] are "
        "each"
        " row's mean, 1 / std and (mean as rounded - mean) / std; zeros are computed.");
});

}  // namespace
}  // namespace rk
