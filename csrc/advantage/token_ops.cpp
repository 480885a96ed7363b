// token_advantages on the CPU: schema, memory-safety checks, groups of rows in parallel, then the whitening.
#include "advantage/optimize.h"
#include "advantage/planes.h"
#include "normalize/moments.h"
#define RK_ROWS "advantage/token_rows.h"
#include "common/foreach_isa.h"
#include "normalize/blocks.h"

namespace rk {
namespace {

struct TokenOptions {
  double kl_coef, gamma, lam;
  bool carry, normalized;
  NormalizeOptions whitening;
  int64_t grain;
};

// The inputs of one call, checked; copies that make rows contiguous live as long as it does.
template <class T>
struct TokenInputs {
  using A = acc_t<T>;
  Planes planes;
  Plane<const T> score, kl, values;
  Plane<const uint8_t> mask;

  TokenInputs(const Tensor& given_score, const Tensor& given_kl, const Tensor& given_values,
              const Tensor& given_mask)
      : planes(given_values, "token_advantages"),
        score(planes.column<T>(given_score)),
        kl(planes.matrix<T>(given_kl)),
        values(planes.matrix<T>(given_values)),
        mask(planes.flags(given_mask, {}, {}, true).mask) {}

  int64_t rows() const { return planes.rows(); }
  int64_t steps() const { return planes.steps(); }

  // Advantages before whitening, and returns unless null.
  template <class Out>
  void advantages(const Plane<Out>& advantages, const Plane<T>& returns, const TokenOptions& options) const {
    const TokenForward<T, Out> g{score,  kl,      values,          mask,          advantages, returns,
                                 rows(), steps(), options.kl_coef, options.gamma, options.lam};
    const auto kernel =
        options.carry ? RK_PICK(token_rows<T, Out, true>) : RK_PICK(token_rows<T, Out, false>);
    each_group(rows(), steps(), options.grain, [&](int64_t begin, int64_t end) { kernel(g, begin, end); });
  }

  // The whole batch as one row to be normalised.
  Problem<A> whitening(const Plane<A>& advantages, const TokenOptions& options) const {
    return {Source<A>(advantages.data, steps(), steps()),
            Source<uint8_t>(mask.data, steps(), mask.stride),
            1,
            rows() * steps(),
            options.grain,
            options.whitening};
  }
};

template <class A>
Tensor wide(const Planes& planes, const Tensor& like) {
  const int64_t sizes[2] = {planes.rows(), planes.steps()};
  return empty_as(like, sizes, 2, sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float);
}

std::tuple<Tensor, Tensor> token_advantages(const Tensor& score, const Tensor& kl, const Tensor& values,
                                            const Tensor& mask, double kl_coef, double gamma, double lam,
                                            bool carry, bool normalized, double eps, int64_t flags,
                                            int64_t grain) {
  const TokenOptions options{kl_coef, gamma, lam, carry, normalized, NormalizeOptions::of(eps, flags), grain};
  std::optional<std::tuple<Tensor, Tensor>> results;
  dispatch_float(values.scalar_type(), "token_advantages", [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    TokenInputs<T> inputs(score, kl, values, mask);
    const Tensor advantages = inputs.planes.empty(), returns = inputs.planes.empty();
    results.emplace(advantages, returns);
    if (inputs.rows() == 0 || inputs.steps() == 0) return;
    const auto out = written<T>(advantages), returned = written<T>(returns);
    if (!normalized) return inputs.advantages(out, returned, options);
    // 16-bit advantages are rounded once, after whitening.
    const Tensor digits = sizeof(T) == sizeof(A) ? advantages : wide<A>(inputs.planes, values);
    inputs.advantages(written<A>(digits), returned, options);
    normalize_all<T>(inputs.whitening(written<A>(digits), options), out.data);
  });
  return *results;
}

std::tuple<Tensor, Tensor, Tensor> token_advantages_backward(const Tensor& grad, const Tensor& grad_returns,
                                                             const Tensor& score, const Tensor& kl,
                                                             const Tensor& values, const Tensor& mask,
                                                             double kl_coef, double gamma, double lam,
                                                             bool carry, bool normalized, double eps,
                                                             int64_t flags, int64_t grain) {
  const TokenOptions options{kl_coef, gamma, lam, carry, normalized, NormalizeOptions::of(eps, flags), grain};
  std::optional<std::tuple<Tensor, Tensor, Tensor>> results;
  dispatch_float(values.scalar_type(), "token_advantages_backward", [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    TokenInputs<T> inputs(score, kl, values, mask);
    const int64_t rows = inputs.rows(), steps = inputs.steps();
    const Tensor grad_score = empty_as(values, &rows, 1, values.scalar_type());
    const Tensor grad_kl = inputs.planes.empty(), grad_values = inputs.planes.empty();
    results.emplace(grad_score, grad_kl, grad_values);
    const auto to_score = written<T>(grad_score);
    // Without steps no score reaches anything.
    for (int64_t r = 0; steps == 0 && r < rows; ++r) *to_score.row(r) = T{};
    if (rows == 0 || steps == 0) return;

    TokenBackward<T> g{inputs.planes.template matrix<T>(grad),
                       inputs.planes.template matrix<T>(grad_returns),
                       {},
                       inputs.mask,
                       to_score,
                       written<T>(grad_kl),
                       written<T>(grad_values),
                       rows,
                       steps,
                       kl_coef,
                       gamma,
                       lam};
    std::optional<Tensor> digits;
    Moments moments;
    GradientSums sums;
    if (normalized) {
      digits = wide<A>(inputs.planes, values);
      const auto advantages = written<A>(*digits);
      inputs.advantages(advantages, Plane<T>{}, options);
      g.advantages = {advantages.data, advantages.stride};
      const auto problem = inputs.whitening(advantages, options);
      moments = problem.moments(0);
      sums = problem.gradient_sums(0, Source<T>(g.grad_advantages.data, steps, g.grad_advantages.stride),
                                   moments);
    }
    const BackwardMap<A> map(moments, sums, options.whitening);
    const auto kernel = normalized ? (carry ? RK_PICK(token_backward_rows<T, true, true>)
                                            : RK_PICK(token_backward_rows<T, false, true>))
                                   : (carry ? RK_PICK(token_backward_rows<T, true, false>)
                                            : RK_PICK(token_backward_rows<T, false, false>));
    each_group(rows, steps, grain, [&](int64_t begin, int64_t end) { kernel(g, map, begin, end); });
  });
  return *results;
}

}  // namespace
}  // namespace rk

STABLE_TORCH_LIBRARY_FRAGMENT(rlhf_kernels_native, m) {
  m.def(
      "token_advantages(Tensor score, Tensor kl, Tensor values, Tensor mask, float kl_coef, float gamma,"
      " float lam, bool carry, bool normalized, float eps, int flags, int grain=32768) -> (Tensor, Tensor)");
  m.def(
      "token_advantages_backward(Tensor grad, Tensor grad_returns, Tensor score, Tensor kl, Tensor values,"
      " Tensor mask, float kl_coef, float gamma, float lam, bool carry, bool normalized, float eps, int "
      "flags,"
      " int grain=32768) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels_native, CPU, m) {
  m.impl("token_advantages", TORCH_BOX(&rk::token_advantages));
  m.impl("token_advantages_backward", TORCH_BOX(&rk::token_advantages_backward));
}
