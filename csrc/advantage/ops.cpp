// gae on the CPU: schema, memory-safety checks, groups of rows in parallel.
#include "advantage/planes.h"
#define RK_ROWS "advantage/rows.h"
#include "common/foreach_isa.h"

namespace rk {
namespace {

// Rows that fill the lanes of every instruction set.
constexpr int64_t kGroup = 16;

// rows(g, begin, end) by the kernel that this kind needs.
template <class Problem, class Plain, class Masked, class General>
void run(const Problem& g, GaeKind kind, int64_t grain, Plain plain, Masked masked, General general) {
  const auto rows = kind == GaeKind::kPlain ? plain : kind == GaeKind::kMasked ? masked : general;
  parallel_rows((g.rows + kGroup - 1) / kGroup, kGroup * g.steps, grain, [&](int64_t begin, int64_t end) {
    rows(g, begin * kGroup, end * kGroup < g.rows ? end * kGroup : g.rows);
  });
}

std::tuple<Tensor, Tensor> gae_general(const Tensor& rewards, const Tensor& values,
                                       const std::optional<Tensor>& mask, const std::optional<Tensor>& done,
                                       const std::optional<Tensor>& truncated,
                                       const std::optional<Tensor>& next_value, double gamma, double lam,
                                       bool carry, int64_t grain) {
  Planes planes(rewards);
  Tensor advantages = planes.empty(), returns = planes.empty();
  dispatch_float(planes.dtype(), "gae", [&](auto zero) {
    using T = decltype(zero);
    GaeForward<T> g{};
    g.rewards = planes.matrix<T>(rewards);
    g.values = planes.matrix<T>(values);
    const bool per_step = next_value && next_value->dim() == 2;
    if (per_step)
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
    run(g, kind_of(g.flags, per_step), grain, RK_PICK(gae_rows<T, GaeKind::kPlain>),
        RK_PICK(gae_rows<T, GaeKind::kMasked>), RK_PICK(gae_rows<T, GaeKind::kGeneral>));
  });
  return {advantages, returns};
}

// The common case apart: five arguments less save 0.7 us a call.
std::tuple<Tensor, Tensor> gae(const Tensor& rewards, const Tensor& values, const std::optional<Tensor>& mask,
                               double gamma, double lam, int64_t grain) {
  return gae_general(rewards, values, mask, {}, {}, {}, gamma, lam, true, grain);
}

std::tuple<Tensor, Tensor, Tensor> gae_backward(const Tensor& grad, const Tensor& grad_returns,
                                                const std::optional<Tensor>& mask,
                                                const std::optional<Tensor>& done,
                                                const std::optional<Tensor>& truncated, int64_t next_dims,
                                                double gamma, double lam, bool carry, int64_t grain) {
  Planes planes(grad);
  Tensor grad_rewards = planes.empty(), grad_values = planes.empty();
  const int64_t sizes[2] = {next_dims ? planes.rows() : 0, planes.steps()};
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
    run(g, kind_of(g.flags, next_dims == 2), grain, RK_PICK(gae_backward_rows<T, GaeKind::kPlain>),
        RK_PICK(gae_backward_rows<T, GaeKind::kMasked>), RK_PICK(gae_backward_rows<T, GaeKind::kGeneral>));
    // No step, no gradient: what follows the last one reaches nothing.
    if (g.steps == 0 && g.grad_last)
      for (int64_t r = 0; r < g.rows; ++r) g.grad_last.row(r)[0] = T{};
  });
  return {grad_rewards, grad_values, grad_next};
}

}  // namespace
}  // namespace rk

STABLE_TORCH_LIBRARY_FRAGMENT(rlhf_kernels_native, m) {
  m.def(
      "gae(Tensor rewards, Tensor values, Tensor? mask, float gamma, float lam, int grain=32768)"
      " -> (Tensor, Tensor)");
  m.def(
      "gae_general(Tensor rewards, Tensor values, Tensor? mask, Tensor? done, Tensor? truncated,"
      " Tensor? next_value, float gamma, float lam, bool carry, int grain=32768) -> (Tensor, Tensor)");
  m.def(
      "gae_backward(Tensor grad, Tensor grad_returns, Tensor? mask, Tensor? done, Tensor? truncated,"
      " int next_dims, float gamma, float lam, bool carry, int grain=32768) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels_native, CPU, m) {
  m.impl("gae", TORCH_BOX(&rk::gae));
  m.impl("gae_general", TORCH_BOX(&rk::gae_general));
  m.impl("gae_backward", TORCH_BOX(&rk::gae_backward));
}
