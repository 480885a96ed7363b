// What a normalisation knows of a row, on the CPU and on the GPU: moments that merge, and the maps they give.
#pragma once

#include "common/isa.h"

#ifdef __CUDACC__
  #define RK_BOTH __host__ __device__
#else
  #define RK_BOTH
#endif

namespace rk {

// Rows are reduced in blocks of this many elements, which fit the first-level cache; the blocks' moments are
// merged in order. A row's arithmetic is therefore a function of its length alone.
constexpr int64_t kBlock = 4096;

struct NormalizeOptions {
  double eps;
  bool add_eps, unbiased, center, zero_masked;

  // The bits are named in ops/normalize/arguments.py.
  static NormalizeOptions of(double eps, int64_t flags) {
    return {eps, bool(flags & 1), bool(flags & 2), bool(flags & 4), bool(flags & 8)};
  }
};

// Count, mean and sum of squared deviations of the real elements.
struct Moments {
  int64_t count = 0;
  double mean = 0;
  double squares = 0;

  // Chan, Golub and LeVeque (1983).
  RK_BOTH void merge(const Moments& other) {
    if (other.count == 0) return;
    const double total = double(count + other.count);
    const double delta = other.mean - mean;
    const double share = double(other.count) / total;
    squares += other.squares + delta * delta * double(count) * share;
    mean = count == 0 ? other.mean : mean + delta * share;
    count += other.count;
  }

  // With fewer than two elements the variance is 0, with or without Bessel's correction.
  RK_BOTH double freedom(const NormalizeOptions& options) const {
    const int64_t n = count - (options.unbiased ? 1 : 0);
    return double(n > 1 ? n : 1);
  }
  RK_BOTH double variance(const NormalizeOptions& options) const { return squares / freedom(options); }

  RK_BOTH double rstd(const NormalizeOptions& options) const {
    const double var = variance(options);
    // Written so that NaN stays NaN.
    const double kept = options.add_eps ? var + options.eps : var < options.eps ? options.eps : var;
#ifdef __CUDA_ARCH__
    return rsqrt(kept);
#else
    return 1.0 / std::sqrt(kept);
#endif
  }
};

// Sums over the outputs that depend on the moments: of the gradient, and of the gradient times x - mean.
struct GradientSums {
  double grad = 0;
  double along = 0;

  RK_BOTH void merge(const GradientSums& other) {
    grad += other.grad;
    along += other.along;
  }
};

// A mean that needs more digits than A has; x - mean is (x - high) - low, the first difference being exact
// where it matters.
template <class A>
struct Center {
  A high, low;

  RK_BOTH explicit Center(double mean) : high(A(mean)), low(A(mean - double(A(mean)))) {}
  RK_BOTH A operator()(A x) const { return (x - high) - low; }
};

// out = (x - mean) * scale + offset
template <class A>
struct ForwardMap {
  Center<A> center;
  A scale, offset;

  RK_BOTH ForwardMap(const Moments& m, const NormalizeOptions& options)
      : center(m.mean), scale(A(m.rstd(options))), offset(options.center ? A(0) : A(m.mean)) {}
  RK_BOTH A operator()(A x) const { return center(x) * scale + offset; }
};

// The gradient of x is grad * scale at masked slots. At real ones the mean takes the average gradient away,
// before the scale so that it cancels, and the variance adds slope * (x - mean); without centering the mean
// also goes to the output by itself.
template <class A>
struct BackwardMap {
  Center<A> center;
  A scale, average, direct, slope;

  RK_BOTH BackwardMap(const Moments& m, const GradientSums& sums, const NormalizeOptions& options)
      : center(m.mean), scale(A(m.rstd(options))), slope(0) {
    const double mean_grad = sums.grad / double(m.count > 1 ? m.count : 1);
    average = A(mean_grad);
    direct = options.center ? A(0) : average;
    const double rstd = m.rstd(options);
    const bool clamped = !options.add_eps && m.variance(options) < options.eps;
    if (!clamped) slope = A(-rstd * rstd * rstd * sums.along / m.freedom(options));
  }
  RK_BOTH A masked(A grad) const { return grad * scale; }
  RK_BOTH A real(A grad, A x) const { return (grad - average) * scale + (direct + slope * center(x)); }
};

}  // namespace rk
