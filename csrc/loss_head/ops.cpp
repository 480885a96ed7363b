// logprob on the CPU: schema, memory-safety checks, rows in parallel.
#include "common/tensor.h"
#include "loss_head/args.h"
#define RK_ROWS "loss_head/rows.h"
#include "common/foreach_isa.h"

namespace rk {
namespace {

// The type of the results and of their gradients.
ScalarType by_row_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// One element a row side by side; a copy where they are not.
Tensor by_row(const char* op, const Tensor& t, const Rows& logits, ScalarType dtype) {
  STD_TORCH_CHECK(t.scalar_type() == dtype && t.numel() == logits.rows, op,
                  ": one element of the right dtype is expected for each row of the logits");
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

Tensor ids_of(const char* op, const Tensor& target, const Rows& logits) {
  Tensor ids = by_row(op, target, logits, ScalarType::Long);
  const int64_t* at = static_cast<const int64_t*>(ids.data_ptr());
  int64_t outside = 0;
  for (int64_t r = 0; r < logits.rows; ++r) outside += at[r] < 0 || at[r] >= logits.cols;
  STD_TORCH_CHECK(outside == 0, op, ": targets must be at least 0 and below ", logits.cols, ", and ", outside,
                  " are not");
  return ids;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> logprob(const Tensor& logits, const Tensor& target,
                                                   double temperature, int64_t grain) {
  const Rows rows = as_groups(logits);
  const Tensor ids = ids_of("logprob", target, rows);
  const Shape shape(target);
  const auto result = [&] { return empty_as(target, shape.sizes, shape.dim, by_row_type(logits)); };
  Tensor logprob = result(), entropy = result(), peak = result(), log_total = result();
  dispatch_float(logits.scalar_type(), "logprob", [&](auto zero) {
    using T = decltype(zero);
    const auto at = [](const Tensor& t) { return static_cast<acc_t<T>*>(t.data_ptr()); };
    const LogprobForward<T> g{rows.groups<T>(), static_cast<const int64_t*>(ids.data_ptr()),
                              at(logprob),      at(entropy),
                              at(peak),         at(log_total),
                              rows.rows,        rows.cols,
                              temperature};
    const auto kernel = RK_PICK(logprob_rows<T>);
    parallel_rows(g.rows, g.vocabulary, grain, [&](int64_t begin, int64_t end) { kernel(g, begin, end); });
  });
  return {logprob, entropy, peak, log_total};
}

// Writes the gradient of the logits to `out`, which may be they.
void gradient(const char* op, const Tensor& grad_logprob, const Tensor& grad_entropy, const Rows& rows,
              const Tensor& target, const Tensor& entropy, const Tensor& peak, const Tensor& log_total,
              double temperature, int64_t grain, const Rows& out) {
  const Tensor ids = ids_of(op, target, rows);
  const Tensor* given[] = {&grad_logprob, &grad_entropy, &entropy, &peak, &log_total};
  std::vector<Tensor> held;
  for (const Tensor* t : given) held.push_back(by_row(op, *t, rows, by_row_type(rows.tensor)));
  dispatch_float(rows.tensor.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    const auto at = [&](int i) { return static_cast<const acc_t<T>*>(held[i].data_ptr()); };
    const LogprobBackward<T> g{rows.groups<T>(),
                               static_cast<const int64_t*>(ids.data_ptr()),
                               at(0),
                               at(1),
                               at(2),
                               at(3),
                               at(4),
                               {out.mutable_data<T>(), out.stride},
                               rows.rows,
                               rows.cols,
                               temperature};
    const auto kernel = RK_PICK(logprob_backward_rows<T>);
    parallel_rows(g.rows, g.vocabulary, grain, [&](int64_t begin, int64_t end) { kernel(g, begin, end); });
  });
}

Tensor logprob_backward(const Tensor& grad_logprob, const Tensor& grad_entropy, const Tensor& logits,
                        const Tensor& target, const Tensor& entropy, const Tensor& peak,
                        const Tensor& log_total, double temperature, int64_t grain) {
  Tensor out = new_like(logits);
  gradient("logprob_backward", grad_logprob, grad_entropy, as_groups(logits), target, entropy, peak,
           log_total, temperature, grain, as_rows(out));
  return out;
}

// The gradient in the place of the logits.
void logprob_backward_(const Tensor& grad_logprob, const Tensor& grad_entropy, const Tensor& logits,
                       const Tensor& target, const Tensor& entropy, const Tensor& peak,
                       const Tensor& log_total, double temperature, int64_t grain) {
  const Rows rows = as_rows(logits);
  STD_TORCH_CHECK(rows.tensor.data_ptr() == logits.data_ptr() && (rows.rows <= 1 || rows.stride >= rows.cols),
                  "logprob_backward_: the logits must lie in rows that do not overlap");
  gradient("logprob_backward_", grad_logprob, grad_entropy, rows, target, entropy, peak, log_total,
           temperature, grain, rows);
}

}  // namespace
}  // namespace rk

STABLE_TORCH_LIBRARY_FRAGMENT(rlhf_kernels_native, m) {
  m.def(
      "logprob(Tensor logits, Tensor target, float temperature, int grain=32768)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "logprob_backward(Tensor grad_logprob, Tensor grad_entropy, Tensor logits, Tensor target,"
      " Tensor entropy, Tensor peak, Tensor log_total, float temperature, int grain=32768) -> Tensor");
  m.def(
      "logprob_backward_(Tensor grad_logprob, Tensor grad_entropy, Tensor(a!) logits, Tensor target,"
      " Tensor entropy, Tensor peak, Tensor log_total, float temperature, int grain=32768) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels_native, CPU, m) {
  m.impl("logprob", TORCH_BOX(&rk::logprob));
  m.impl("logprob_backward", TORCH_BOX(&rk::logprob_backward));
  m.impl("logprob_backward_", TORCH_BOX(&rk::logprob_backward_));
}
