// Tensors of the advantage room as planes: what both the CPU and the CUDA operators check and hold.
#pragma once

#include "advantage/args.h"
#include "common/tensor.h"

namespace rk {

// run(begin, end) in parallel, for groups of rows that fill the lanes of every instruction set.
template <class Rows>
void each_group(int64_t rows, int64_t steps, int64_t grain, const Rows& run) {
  constexpr int64_t group = 16;
  parallel_rows((rows + group - 1) / group, group * steps, grain, [&](int64_t begin, int64_t end) {
    run(begin * group, end * group < rows ? end * group : rows);
  });
}

// Tensors of one call, as large as `like`; copies that make rows contiguous live as long as it does.
class Planes {
 public:
  explicit Planes(const Tensor& like, const char* op = "gae")
      : like_(like), op_(op), dtype_(like.scalar_type()) {
    const Shape shape(like);
    STD_TORCH_CHECK(shape.dim == 2, op_, ": expected [batch, time], got ", shape.dim, " dimensions");
    sizes_[0] = shape.sizes[0];
    sizes_[1] = shape.sizes[1];
  }

  int64_t rows() const { return sizes_[0]; }
  int64_t steps() const { return sizes_[1]; }
  ScalarType dtype() const { return dtype_; }

  Tensor empty() const { return empty_as(like_, sizes_, 2, dtype_); }

  template <class T>
  Plane<const T> matrix(const Tensor& t) {
    return plane<T>(t, dtype_);
  }

  // One element per row.
  template <class T>
  Plane<const T> column(const Tensor& t) const {
    STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == rows() && t.scalar_type() == dtype_, op_,
                    ": a tensor of one element per row does not fit");
    return {static_cast<const T*>(t.data_ptr()), t.stride(0)};
  }

  GaeFlags flags(const std::optional<Tensor>& mask, const std::optional<Tensor>& done,
                 const std::optional<Tensor>& truncated, bool carry) {
    return {flag(mask), flag(done), flag(truncated), carry};
  }

 private:
  Plane<const uint8_t> flag(const std::optional<Tensor>& t) {
    return t ? plane<uint8_t>(*t, ScalarType::Bool) : Plane<const uint8_t>{};
  }

  template <class T>
  Plane<const T> plane(const Tensor& t, ScalarType dtype) {
    const Shape shape(t);
    STD_TORCH_CHECK(
        shape.dim == 2 && shape.sizes[0] == rows() && shape.sizes[1] == steps() && t.scalar_type() == dtype,
        op_, ": a tensor does not fit the others");
    if (steps() <= 1 || shape.strides[1] == 1) return {static_cast<const T*>(t.data_ptr()), shape.strides[0]};
    copies_.push_back(torch::stable::contiguous(t));
    return {static_cast<const T*>(copies_.back().data_ptr()), steps()};
  }

  const Tensor& like_;
  const char* op_;
  const ScalarType dtype_;
  int64_t sizes_[2];
  std::vector<Tensor> copies_;
};

template <class T>
Plane<T> written(const Tensor& out) {
  return {static_cast<T*>(out.data_ptr()), out.dim() == 2 ? out.size(1) : 1};
}

// Allocates the results, and has `compute` fill them.
template <class Compute>
std::tuple<Tensor, Tensor> gae_results(const Tensor& rewards, const Tensor& values,
                                       const std::optional<Tensor>& mask, const std::optional<Tensor>& done,
                                       const std::optional<Tensor>& truncated,
                                       const std::optional<Tensor>& next_value, double gamma, double lam,
                                       bool carry, const Compute& compute) {
  Planes planes(rewards);
  Tensor advantages = planes.empty(), returns = planes.empty();
  dispatch_float(planes.dtype(), "gae", [&](auto zero) {
    using T = decltype(zero);
    GaeForward<T> g{};
    g.rewards = planes.matrix<T>(rewards);
    g.values = planes.matrix<T>(values);
    if (next_value && next_value->dim() == 2)
      g.next = planes.matrix<T>(*next_value);
    else if (next_value)
      g.last = planes.column<T>(*next_value);
    g.flags = planes.flags(mask, done, truncated, carry);
    g.advantages = written<T>(advantages);
    g.returns = written<T>(returns);
    g.rows = planes.rows();
    g.steps = planes.steps();
    g.gamma = gamma;
    g.lam = lam;
    compute(g);
  });
  return {advantages, returns};
}

// The third result has next_value's shape, of `next_dims` dimensions; empty for 0.
template <class Compute>
std::tuple<Tensor, Tensor, Tensor> gae_gradients(const Tensor& grad, const Tensor& grad_returns,
                                                 const std::optional<Tensor>& mask,
                                                 const std::optional<Tensor>& done,
                                                 const std::optional<Tensor>& truncated, int64_t next_dims,
                                                 double gamma, double lam, bool carry,
                                                 const Compute& compute) {
  Planes planes(grad);
  const int64_t sizes[2] = {next_dims ? planes.rows() : 0, planes.steps()};
  Tensor grad_rewards = planes.empty(), grad_values = planes.empty();
  Tensor grad_next = empty_as(grad, sizes, next_dims == 2 ? 2 : 1, planes.dtype());
  dispatch_float(planes.dtype(), "gae_backward", [&](auto zero) {
    using T = decltype(zero);
    GaeBackward<T> g{};
    g.grad_advantages = planes.matrix<T>(grad);
    g.grad_returns = planes.matrix<T>(grad_returns);
    g.flags = planes.flags(mask, done, truncated, carry);
    g.grad_rewards = written<T>(grad_rewards);
    g.grad_values = written<T>(grad_values);
    if (next_dims) (next_dims == 2 ? g.grad_next : g.grad_last) = written<T>(grad_next);
    g.rows = planes.rows();
    g.steps = planes.steps();
    g.gamma = gamma;
    g.lam = lam;
    compute(g);
  });
  return {grad_rewards, grad_values, grad_next};
}

}  // namespace rk
