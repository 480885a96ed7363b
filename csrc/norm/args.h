// What the row kernels of layer_norm and rms_norm take. Torch-free.
#pragma once

#include "common/groups.h"
#include "common/isa.h"
#include "common/plane.h"

namespace rk {

// The gradients of weight and bias are summed over so many rows at a time, and the sums of the groups in
// their order: neither depends on the number of threads.
constexpr int64_t kNormGroup = 64;

// What is kept of a row: its mean, 1 / std, and what the rounded mean left over, times that. Where 1 / std is
// 0, nothing was kept (the forward was another backend's).
constexpr int64_t kNormStatistics = 3;

// The parameters are of the type that the arithmetic is in, weight_offset added; `bias` may be null. The rows
// are x, or x + residual as T holds it: that goes to `summed`. `statistics` is [rows, kNormStatistics], for
// the backward.
template <class T, class A = acc_t<T>>
struct NormForward {
  Groups<const T> x, residual;
  const A *weight, *bias;
  Plane<T> summed, out;
  A* statistics;
  int64_t cols;
  double eps;
  bool center;
};

// `grad_summed` is what reaches the rows beside `grad`, or null. The sums are [groups, cols]; those of the
// bias null where there is none.
template <class T, class A = acc_t<T>>
struct NormBackward {
  Groups<const T> grad, grad_summed, x;
  const A *weight, *statistics;
  Plane<T> grad_x;
  A *weight_sums, *bias_sums;
  int64_t rows, cols;
  double eps;
  bool center;

  int64_t groups() const { return (rows + kNormGroup - 1) / kNormGroup; }
};

}  // namespace rk
