// layer_norm and rms_norm on the CPU: schema, memory-safety checks, rows in parallel.
#include <algorithm>
#include <memory>

#include "common/tensor.h"
#include "norm/args.h"
#define RK_ROWS "norm/rows.h"
#include "common/foreach_isa.h"

namespace rk {
namespace {

// Calls f with a value of the type that stores the parameters: x's, T, or float.
template <class T, class F>
void dispatch_parameter(const char* op, const Tensor& weight, const Tensor& x, F&& f) {
  constexpr bool narrow = !std::is_same_v<T, double>;
  if (weight.scalar_type() == x.scalar_type()) return f(T());
  STD_TORCH_CHECK(narrow && weight.scalar_type() == ScalarType::Float, op,
                  ": the weight must have the dtype of x, or float32");
  if constexpr (narrow) f(float());
}

// A parameter in the type of the arithmetic, converted where it is not.
template <class W, class A = acc_t<W>>
class Parameter {
 public:
  Parameter(const char* op, const Tensor& t, const Tensor& weight, int64_t cols, double offset)
      : rows_(as_groups(t)) {
    STD_TORCH_CHECK(t.dim() == 1 && t.numel() == cols && t.scalar_type() == weight.scalar_type(), op,
                    ": weight and bias must have one element for each of x's last dimension, and one dtype");
    if constexpr (std::is_same_v<W, A>)
      if (offset == 0) {
        at_ = rows_.data<A>();
        return;
      }
    held_.reset(new A[cols]);
    at_ = held_.get();
    RK_PICK(norm_parameter<W>)(rows_.data<W>(), offset, held_.get(), cols);
  }
  const A* data() const { return at_; }

 private:
  Rows rows_;
  std::unique_ptr<A[]> held_;
  const A* at_;
};

// [..., kNormStatistics], in the type of the arithmetic.
ScalarType statistics_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}
Tensor new_statistics(const Tensor& x) {
  const Shape shape(x);
  int64_t sizes[Shape::kMostDims];
  std::copy(shape.sizes, shape.sizes + shape.dim, sizes);
  sizes[shape.dim - 1] = kNormStatistics;
  return empty_as(x, sizes, shape.dim, statistics_dtype(x));
}

Rows rows_like(const char* op, const Tensor& t, const Rows& x) {
  const Rows rows = as_groups(t);
  STD_TORCH_CHECK(rows.rows == x.rows && rows.cols == x.cols && t.scalar_type() == x.tensor.scalar_type(), op,
                  ": residual and gradients must have the shape and dtype of x");
  return rows;
}

template <class T>
Groups<const T> groups_of(const std::optional<Rows>& rows) {
  return rows ? rows->groups<T>() : Groups<const T>{};
}

// Also the sum of x and the residual, or empty, and what the backward needs to know of each row.
std::tuple<Tensor, Tensor, Tensor> norm(const Tensor& x, const Tensor& weight,
                                        const std::optional<Tensor>& bias,
                                        const std::optional<Tensor>& residual, double eps,
                                        double weight_offset, bool center, int64_t grain) {
  STD_TORCH_CHECK(x.dim() >= 1, "norm: expected at least one dimension");
  const Rows rows = as_groups(x);
  std::optional<Rows> added;
  if (residual) added = rows_like("norm", *residual, rows);
  const int64_t none = 0;
  Tensor out = new_like(x), summed = residual ? new_like(x) : new_like(x, &none, 1);
  Tensor statistics = new_statistics(x);
  dispatch_float(x.scalar_type(), "norm", [&](auto zero) {
    using T = decltype(zero);
    dispatch_parameter<T>("norm", weight, x, [&](auto like) {
      using W = decltype(like);
      const Parameter<W> scale("norm", weight, weight, rows.cols, weight_offset);
      std::optional<Parameter<W>> shift;
      if (bias) shift.emplace("norm", *bias, weight, rows.cols, 0.0);
      const NormForward<T> g{rows.groups<T>(),
                             groups_of<T>(added),
                             scale.data(),
                             shift ? shift->data() : nullptr,
                             {static_cast<T*>(summed.data_ptr()), rows.cols},
                             {static_cast<T*>(out.data_ptr()), rows.cols},
                             static_cast<acc_t<T>*>(statistics.data_ptr()),
                             rows.cols,
                             eps,
                             center};
      const auto kernel = RK_PICK(norm_forward_rows<T>);
      parallel_rows(rows.rows, g.cols, grain, [&](int64_t begin, int64_t end) { kernel(g, begin, end); });
    });
  });
  return {out, summed, statistics};
}

// Gradients of the rows that were normalised, of the weight, and of the bias (empty where there is none).
std::tuple<Tensor, Tensor, Tensor> norm_backward(const Tensor& grad, const std::optional<Tensor>& grad_summed,
                                                 const Tensor& x, const Tensor& weight,
                                                 const std::optional<Tensor>& bias, const Tensor& statistics,
                                                 double eps, double weight_offset, bool center,
                                                 int64_t grain) {
  STD_TORCH_CHECK(x.dim() >= 1, "norm_backward: expected at least one dimension");
  const Rows rows = as_groups(x), dy = rows_like("norm_backward", grad, rows);
  std::optional<Rows> besides;
  if (grad_summed) besides = rows_like("norm_backward", *grad_summed, rows);
  const int64_t none = 0;
  STD_TORCH_CHECK(statistics.is_contiguous() && statistics.scalar_type() == statistics_dtype(x) &&
                      statistics.numel() >= rows.rows * kNormStatistics,
                  "norm_backward: statistics must be those that norm returned");
  Tensor grad_x = new_like(x), grad_weight = new_like(weight);
  Tensor grad_bias = bias ? new_like(weight) : new_like(weight, &none, 1);
  dispatch_float(x.scalar_type(), "norm_backward", [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    dispatch_parameter<T>("norm_backward", weight, x, [&](auto like) {
      using W = decltype(like);
      const Parameter<W> scale("norm_backward", weight, weight, rows.cols, weight_offset);
      NormBackward<T> g{dy.groups<T>(),
                        groups_of<T>(besides),
                        rows.groups<T>(),
                        scale.data(),
                        static_cast<const A*>(statistics.data_ptr()),
                        {static_cast<T*>(grad_x.data_ptr()), rows.cols},
                        nullptr,
                        nullptr,
                        rows.rows,
                        rows.cols,
                        eps,
                        center};
      const int64_t groups = g.groups(), sums = groups * g.cols;
      const std::unique_ptr<A[]> held(new A[bias ? 2 * sums : sums]);
      g.weight_sums = held.get();
      g.bias_sums = bias ? held.get() + sums : nullptr;
      const auto kernel = RK_PICK(norm_backward_groups<T>);
      parallel_rows(groups, kNormGroup * g.cols, grain,
                    [&](int64_t begin, int64_t end) { kernel(g, begin, end); });
      const auto combine = RK_PICK(norm_combine<W>);
      parallel_rows(rows.cols, groups, grain, [&](int64_t begin, int64_t end) {
        combine(g.weight_sums, groups, g.cols, static_cast<W*>(grad_weight.data_ptr()), begin, end);
        if (bias) combine(g.bias_sums, groups, g.cols, static_cast<W*>(grad_bias.data_ptr()), begin, end);
      });
    });
  });
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace rk

STABLE_TORCH_LIBRARY_FRAGMENT(rlhf_kernels_native, m) {
  m.def(
      "norm(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, float eps, float weight_offset=0.,"
      " bool center=True, int grain=32768) -> (Tensor, Tensor, Tensor)");
  m.def(
      "norm_backward(Tensor grad, Tensor? grad_summed, Tensor x, Tensor weight, Tensor? bias,"
      " Tensor statistics, float eps, float weight_offset=0., bool center=True, int grain=32768)"
      " -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels_native, CPU, m) {
  m.impl("norm", TORCH_BOX(&rk::norm));
  m.impl("norm_backward", TORCH_BOX(&rk::norm_backward));
}
