// masked_normalize on the CPU: schema, memory-safety checks, blocks and rows in parallel.
#include "common/tensor.h"
#include "normalize/moments.h"
#define RK_ROWS "normalize/rows.h"
#include "common/foreach_isa.h"
#include "normalize/blocks.h"

namespace rk {
namespace {

void check(const Tensor& x, const std::optional<Tensor>& mask, int64_t trailing) {
  STD_TORCH_CHECK(trailing >= 0 && trailing <= x.dim(), "masked_normalize: ", trailing,
                  " trailing dimensions of ", x.dim());
  if (!mask) return;
  STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->dim() == x.dim(),
                  "masked_normalize: the mask must be boolean, with the shape of x");
  for (int64_t d = 0; d < x.dim(); ++d)
    STD_TORCH_CHECK(mask->size(d) == x.size(d), "masked_normalize: the mask must have the shape of x");
}

// Keeps copies of strided tensors alive while f(problem) runs.
template <class T, class F>
void with_problem(const Tensor& x, const std::optional<Tensor>& mask, int64_t trailing, int64_t grain,
                  const NormalizeOptions& options, const F& f) {
  int64_t length = 1;
  for (int64_t d = x.dim() - trailing; d < x.dim(); ++d) length *= x.size(d);
  const Rows values = as_rows(x);
  std::optional<Rows> real;
  if (mask) real = as_rows(*mask);
  Problem<T> problem{Source<T>(values), std::nullopt, x.numel() / length, length, grain, options};
  if (real) problem.mask.emplace(*real);
  f(problem);
}

Tensor masked_normalize(const Tensor& x, const std::optional<Tensor>& mask, int64_t trailing, double eps,
                        int64_t flags, int64_t grain) {
  check(x, mask, trailing);
  Tensor out = new_like(x);
  if (x.numel() == 0) return out;
  dispatch_float(x.scalar_type(), "masked_normalize", [&](auto zero) {
    using T = decltype(zero);
    const auto options = NormalizeOptions::of(eps, flags);
    with_problem<T>(x, mask, trailing, grain, options, [&](const Problem<T>& problem) {
      normalize_all<T>(problem, static_cast<T*>(out.data_ptr()));
    });
  });
  return out;
}

Tensor masked_normalize_backward(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& mask,
                                 int64_t trailing, double eps, int64_t flags, int64_t grain) {
  check(x, mask, trailing);
  STD_TORCH_CHECK(grad.numel() == x.numel() && grad.scalar_type() == x.scalar_type(),
                  "masked_normalize_backward: the gradient does not fit x");
  Tensor out = new_like(x);
  if (x.numel() == 0) return out;
  dispatch_float(x.scalar_type(), "masked_normalize_backward", [&](auto zero) {
    using T = decltype(zero);
    T* to = static_cast<T*>(out.data_ptr());
    const Rows grad_rows = as_rows(grad);
    const Source<T> dy(grad_rows);
    const auto kernel = RK_PICK(normalize_gradient_block<T>);
    const auto options = NormalizeOptions::of(eps, flags);
    with_problem<T>(x, mask, trailing, grain, options, [&](const Problem<T>& problem) {
      problem.each_row([&](int64_t row) {
        const Moments moments = problem.moments(row);
        const GradientSums sums = problem.gradient_sums(row, dy, moments);
        const BackwardMap<acc_t<T>> map(moments, sums, options);
        problem.each_block(row, [&](int64_t begin, int64_t n) {
          T values[kBlock], grads[kBlock];
          uint8_t bytes[kBlock];
          kernel(dy.read(begin, n, grads), problem.x.read(begin, n, values),
                 problem.read_mask(begin, n, bytes), to + begin, n, !options.zero_masked, map);
        });
      });
    });
  });
  return out;
}

}  // namespace
}  // namespace rk

STABLE_TORCH_LIBRARY_FRAGMENT(rlhf_kernels_native, m) {
  m.def(
      "masked_normalize(Tensor x, Tensor? mask, int trailing, float eps, int flags, int grain=32768) -> "
      "Tensor");
  m.def(
      "masked_normalize_backward(Tensor grad, Tensor x, Tensor? mask, int trailing, float eps, int flags,"
      " int grain=32768) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels_native, CPU, m) {
  m.impl("masked_normalize", TORCH_BOX(&rk::masked_normalize));
  m.impl("masked_normalize_backward", TORCH_BOX(&rk::masked_normalize_backward));
}
