// gae on the CPU: schema, memory-safety checks, groups of rows in parallel.
#include "advantage/optimize.h"
#include "advantage/planes.h"
#define RK_ROWS "advantage/rows.h"
#include "common/foreach_isa.h"

namespace rk {
namespace {

// rows(g, begin, end) in parallel, by the kernel that this problem needs.
template <class Problem, class Rows>
void run(const Problem& g, bool next_per_step, int64_t grain, Rows plain, Rows masked, Rows zeroed,
         Rows general) {
  const GaeFlags& flags = g.flags;
  const bool simple = !flags.done && !flags.truncated && !next_per_step;
  const auto rows = !simple ? general : !flags.mask ? plain : flags.carry ? masked : zeroed;
  each_group(g.rows, g.steps, grain, [&](int64_t begin, int64_t end) { rows(g, begin, end); });
}

std::tuple<Tensor, Tensor> gae(const Tensor& rewards, const Tensor& values, const std::optional<Tensor>& mask,
                               const std::optional<Tensor>& done, const std::optional<Tensor>& truncated,
                               const std::optional<Tensor>& next_value, double gamma, double lam, bool carry,
                               int64_t grain) {
  return gae_results(rewards, values, mask, done, truncated, next_value, gamma, lam, carry,
                     [&]<class T>(const GaeForward<T>& g) {
                       run(g, bool(g.next), grain, RK_PICK(gae_rows<T, GaeKind::kPlain>),
                           RK_PICK(gae_rows<T, GaeKind::kMasked>), RK_PICK(gae_rows<T, GaeKind::kZeroed>),
                           RK_PICK(gae_rows<T, GaeKind::kGeneral>));
                     });
}

// The common case apart: arguments that are left out save 0.7 us a call.
std::tuple<Tensor, Tensor> gae_common(const Tensor& rewards, const Tensor& values, double gamma, double lam,
                                      const std::optional<Tensor>& mask, int64_t grain) {
  return gae(rewards, values, mask, {}, {}, {}, gamma, lam, true, grain);
}

std::tuple<Tensor, Tensor, Tensor> gae_backward(const Tensor& grad, const Tensor& grad_returns,
                                                const std::optional<Tensor>& mask,
                                                const std::optional<Tensor>& done,
                                                const std::optional<Tensor>& truncated, int64_t next_dims,
                                                double gamma, double lam, bool carry, int64_t grain) {
  return gae_gradients(grad, grad_returns, mask, done, truncated, next_dims, gamma, lam, carry,
                       [&]<class T>(const GaeBackward<T>& g) {
                         run(g, bool(g.grad_next), grain, RK_PICK(gae_backward_rows<T, GaeKind::kPlain>),
                             RK_PICK(gae_backward_rows<T, GaeKind::kMasked>),
                             RK_PICK(gae_backward_rows<T, GaeKind::kZeroed>),
                             RK_PICK(gae_backward_rows<T, GaeKind::kGeneral>));
                         // Without steps, what follows the last one reaches nothing.
                         for (int64_t r = 0; g.steps == 0 && g.grad_last && r < g.rows; ++r)
                           *g.grad_last.row(r) = T{};
                       });
}

}  // namespace
}  // namespace rk

STABLE_TORCH_LIBRARY_FRAGMENT(rlhf_kernels_native, m) {
  m.def(
      "gae_common(Tensor rewards, Tensor values, float gamma, float lam, Tensor? mask=None, int grain=32768)"
      " -> (Tensor, Tensor)");
  m.def(
      "gae(Tensor rewards, Tensor values, Tensor? mask, Tensor? done, Tensor? truncated,"
      " Tensor? next_value, float gamma, float lam, bool carry, int grain=32768) -> (Tensor, Tensor)");
  m.def(
      "gae_backward(Tensor grad, Tensor grad_returns, Tensor? mask, Tensor? done, Tensor? truncated,"
      " int next_dims, float gamma, float lam, bool carry, int grain=32768) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels_native, CPU, m) {
  m.impl("gae_common", TORCH_BOX(&rk::gae_common));
  m.impl("gae", TORCH_BOX(&rk::gae));
  m.impl("gae_backward", TORCH_BOX(&rk::gae_backward));
}
